/* A page that was opened as a file may not start a Worker: there the search runs in a hidden frame. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const load = source =>
        new Promise((resolve, reject) => {
          const script = this.inside.document.createElement("script")
          Object.assign(script, { src: source, onload: resolve, onerror: reject })
          this.inside.document.body.append(script)
        })
      this.inside.importScripts = (...sources) => sources.reduce((last, x) => last.then(() => load(x)), Promise.resolve())
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = load(url)
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
