// Looks at the tensors of a step in one go, and reads their gradients: see native.py.

#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

const at::Tensor& tensor(const py::list& list, size_t i) { return THPVariable_Unpack(PyList_GET_ITEM(list.ptr(), i)); }

const at::Tensor& grad_of(const at::Tensor& p) {
  return static_cast<const c10::TensorImpl*>(p.unsafeGetTensorImpl())->grad();
}

// A tensor's object in Python, null if it has none yet.
template <typename Slot>
auto object_of(Slot* slot, int) -> decltype(slot->load_pyobj()) {
  return slot->load_pyobj();
}
template <typename Slot>
PyObject* object_of(Slot* slot, long) {  // until torch 2.10
  return slot->check_pyobj().value_or(nullptr);
}

// What `PythonReader` in reader.py notes of a parameter.
struct Param {
  bool is_stepped;  // else nothing but the absence of its gradient matters
  bool has_grad;
  bool is_conj = false, is_neg = false;
  void* address = nullptr;
  at::ScalarType dtype = at::ScalarType::Undefined;
  std::vector<int64_t> sizes, strides;

  Param(const at::Tensor& p, bool is_stepped) : is_stepped(is_stepped), has_grad(grad_of(p).defined()) {
    if (!is_stepped) return;
    is_conj = p.is_conj();
    is_neg = p.is_neg();
    address = p.data_ptr();
    dtype = p.scalar_type();
    sizes = p.sizes().vec();
    strides = p.strides().vec();
  }

  bool is_still(const at::Tensor& p) const {
    return !p.key_set().has(c10::DispatchKey::Python) && p.scalar_type() == dtype && p.sizes() == sizes &&
        p.strides() == strides && p.is_conj() == is_conj && p.is_neg() == is_neg && p.data_ptr() == address;
  }

  // Of torch.Tensor itself, on the CPU, with its values in memory in the parameter's order and type. Whatever else it
  // may be, Python knows what to do.
  bool takes(const at::Tensor& grad) const {
    PyObject* object = object_of(grad.unsafeGetTensorImpl()->pyobj_slot(), 0);
    return (object == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(object)) == THPVariableClass) &&
        !grad.key_set().has(c10::DispatchKey::Python) && grad.layout() == at::kStrided && grad.is_cpu() &&
        grad.scalar_type() == dtype && grad.sizes() == sizes && grad.is_contiguous() && !grad.is_conj() &&
        !grad.is_neg() && (grad.numel() == 0 || grad.const_data_ptr() != nullptr);
  }
};

struct Small {
  size_t place;
  void* target;
  size_t nbytes;
};

struct Bucket {
  std::vector<std::optional<size_t>> big;  // places among the parameters; none has no gradient
  std::vector<Small> small;
};

class Reader;

// Holds them, as Python's list of them would.
struct Gradients {
  std::shared_ptr<const Reader> reader;
  std::vector<at::Tensor> grads;

  py::list addresses(size_t bucket) const;
  py::list tensors(size_t bucket) const;
  void gather(size_t bucket) const;
};

// Goes through what `objects` of reader.py found, while it is what is asked for.
struct Same {
  PyObject* objects;
  const std::vector<Py_ssize_t>& lengths;
  Py_ssize_t next = 0;
  size_t next_length = 0;

  bool is(PyObject* object) { return next < PyList_GET_SIZE(objects) && PyList_GET_ITEM(objects, next++) == object; }
  bool has(Py_ssize_t length) { return next_length < lengths.size() && lengths[next_length++] == length; }
  bool is_all() const { return next == PyList_GET_SIZE(objects) && next_length == lengths.size(); }
};

class Reader : public std::enable_shared_from_this<Reader> {
 public:
  // Of each bucket the places of the big parameters, of the small ones that have a gradient, and where those go.
  using Places = std::tuple<std::vector<std::optional<size_t>>, std::vector<size_t>, py::list>;

  Reader(
      const py::list& params,
      const std::vector<bool>& stepped,
      const py::list& views,
      const std::vector<Places>& places) {
    for (size_t i = 0; i < params.size(); ++i) params_.emplace_back(tensor(params, i), stepped.at(i));
    for (size_t i = 0; i < views.size(); ++i) views_.push_back(tensor(views, i).data_ptr());
    for (const auto& [big, small, targets] : places) {
      buckets_.push_back({big, {}});
      for (size_t i = 0; i < small.size(); ++i) {
        const at::Tensor& target = tensor(targets, i);
        buckets_.back().small.push_back({small[i], target.data_ptr(), target.nbytes()});
      }
    }
  }

  // The gradients, or None if anything is other than `objects` (of `objects` in reader.py), the parameters
  // and the views were, or is nothing to be read here.
  py::object read(
      const py::object& groups,
      const py::object& state,
      const py::list& objects,
      const std::vector<Py_ssize_t>& lengths,
      const py::list& views) const {
    try {
      Same same{objects.ptr(), lengths};
      if (std::optional<std::vector<at::Tensor>> grads = find(groups.ptr(), state.ptr(), same, views))
        return py::cast(Gradients{shared_from_this(), std::move(*grads)});
    } catch (const c10::Error&) {  // a tensor of a kind without what was asked for
    }
    return py::none();
  }

  const Bucket& bucket(size_t i) const { return buckets_.at(i); }

 private:
  std::vector<Param> params_;
  std::vector<void*> views_;
  std::vector<Bucket> buckets_;

  std::optional<std::vector<at::Tensor>> find(
      PyObject* groups, PyObject* state, Same& same, const py::list& views) const {
    std::vector<const at::Tensor*> params;
    params.reserve(params_.size());
    if (views.size() != views_.size() || !are_same(groups, state, same, params)) return std::nullopt;
    std::vector<at::Tensor> grads(params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const Param& before = params_[i];
      const at::Tensor& grad = grad_of(*params[i]);
      if (grad.defined() != before.has_grad || (before.is_stepped && !before.is_still(*params[i]))) return std::nullopt;
      if (!before.has_grad) continue;
      if (!before.takes(grad)) return std::nullopt;
      grads[i] = grad;
    }
    for (size_t i = 0; i < views_.size(); ++i)
      if (tensor(views, i).data_ptr() != views_[i]) return std::nullopt;
    return grads;
  }

  // Collects the parameters, which are then those that the constructor was given.
  bool are_same(PyObject* groups, PyObject* state, Same& same, std::vector<const at::Tensor*>& params) const {
    if (!PyList_Check(groups)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
      PyObject* group = PyList_GET_ITEM(groups, i);
      PyObject* list = PyDict_Check(group) ? PyDict_GetItemString(group, "params") : nullptr;
      if (list == nullptr || !PyList_Check(list) || !same.has(PyList_GET_SIZE(list))) return false;
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list); ++j) {
        PyObject* param = PyList_GET_ITEM(list, j);
        if (!same.is(param)) return false;
        params.push_back(&THPVariable_Unpack(param));
      }
    }
    if (!PyDict_Check(state)) return false;
    PyObject *key, *value, *name, *item;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, nullptr);)
      if (!same.is(key)) return false;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
      if (!PyDict_Check(value)) return false;
      if (!same.has(PyDict_Size(value))) return false;
      for (Py_ssize_t i = 0; PyDict_Next(value, &i, &name, nullptr);)
        if (!same.is(name)) return false;
    }
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);)
      for (Py_ssize_t i = 0; PyDict_Next(value, &i, &name, &item);)
        if (!same.is(item)) return false;
    return same.is_all() && params.size() == params_.size();
  }
};

py::list Gradients::addresses(size_t bucket) const {
  py::list found;
  for (const std::optional<size_t>& place : reader->bucket(bucket).big) {
    if (place) {
      found.append(reinterpret_cast<uintptr_t>(grads.at(*place).const_data_ptr()));
    } else {
      found.append(py::none());
    }
  }
  return found;
}

py::list Gradients::tensors(size_t bucket) const {
  py::list found;
  for (const std::optional<size_t>& place : reader->bucket(bucket).big) {
    if (place) {
      found.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(grads.at(*place))));
    } else {
      found.append(py::none());
    }
  }
  return found;
}

void Gradients::gather(size_t bucket) const {
  for (const Small& small : reader->bucket(bucket).small)
    if (small.nbytes) std::memcpy(small.target, grads.at(small.place).const_data_ptr(), small.nbytes);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Gradients>(m, "Gradients")
      .def("addresses", &Gradients::addresses)
      .def("tensors", &Gradients::tensors)
      .def("gather", &Gradients::gather);
  py::class_<Reader, std::shared_ptr<Reader>>(m, "Reader")
      .def(py::init<const py::list&, const std::vector<bool>&, const py::list&, const std::vector<Reader::Places>&>())
      .def("read", &Reader::read);
}
