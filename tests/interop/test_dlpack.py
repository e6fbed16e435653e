"""Values across the border: nothing narrowed, misread or raced in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the border is with torch")

import interop  # noqa: E402
from interop import memory  # noqa: E402
from interop._compat import TORCH  # noqa: E402
from interop.memory import cpu  # noqa: E402
from jopt._compat import JAX, enable_x64  # noqa: E402

FLOATS = ["float16", "bfloat16", "float32", "complex64"]
OTHERS = ["bool", "uint8", "int8", "int16", "int32", "float8_e4m3fn", "float8_e5m2"]


def values(dtype):
    return torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, dtype))


@pytest.mark.parametrize("copy", [True, None, False])
@pytest.mark.parametrize("dtype", FLOATS + OTHERS)
def test_every_type_there_and_back(dtype, copy):
    x = values(dtype)
    if copy is False and "float8" in dtype and TORCH < (2, 10):
        with pytest.raises(ValueError, match="x: cannot share its memory with JAX: float8 types are not supported"):
            interop.to_jax(x, copy=copy)
        return
    array = interop.to_jax(x, copy=copy)
    assert array.dtype == dtype
    assert array.shape == (2, 3)
    np.testing.assert_array_equal(array.astype(jnp.complex64), x.to(torch.complex64))
    back = interop.to_torch(array, copy=copy)
    assert back.dtype is x.dtype
    assert torch.equal(back.to(torch.complex64), x.to(torch.complex64))


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128", "uint64"])
def test_wide_types_are_never_narrowed(dtype):
    x = torch.tensor([2**40 + 1, 3]).to(getattr(torch, dtype))
    for copy in (True, None, False):
        with pytest.raises(
            TypeError, match=f"x: torch.{dtype} would be narrowed to 32 bits while jax_enable_x64 is off"
        ):
            interop.to_jax(x, copy=copy)
    with enable_x64(True):
        array = interop.to_jax(x)
        assert array.dtype == dtype
        assert torch.equal(interop.to_torch(array), x)


def test_a_snapshot_by_default():
    """JAX reads a shared tensor after the call that uses it returned; a copy cannot change."""
    x = torch.ones(2**22)
    work = jax.jit(lambda a: (a * 2 - a).sum() / a.size)
    for _ in range(10):
        x.fill_(1.0)
        result = work(interop.to_jax(x))
        x.fill_(100.0)
        assert float(result) == 1.0
    array = jnp.zeros(4)
    interop.to_torch(array).add_(1)
    assert array.tolist() == [0, 0, 0, 0]


def test_resized_storage_does_not_reach_a_snapshot():
    x = torch.full((1000,), 7.0)
    array = interop.to_jax(x)
    x.untyped_storage().resize_(0)
    torch.randn(100_000)
    assert float(array.sum()) == 7000


def test_sharing_is_sharing():
    x = torch.zeros(1000)
    for copy in (None, False):
        assert interop.to_jax(x, copy=copy).unsafe_buffer_pointer() == x.data_ptr()
        array = jnp.zeros(1000)
        assert interop.to_torch(array, copy=copy).data_ptr() == array.unsafe_buffer_pointer()
    assert interop.to_jax(x).unsafe_buffer_pointer() != x.data_ptr()
    turned = x.view(10, 100).t()
    if JAX < (0, 8):
        with pytest.raises(ValueError, match=r"x: cannot share its memory with JAX: .*non-default layout"):
            interop.to_jax(turned, copy=False)
        assert interop.to_jax(turned, copy=None).shape == (100, 10)
    else:
        assert interop.to_jax(turned, copy=False).unsafe_buffer_pointer() == x.data_ptr()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(100)[1:], "it begins 4 bytes past a multiple of 64"),
        (lambda: torch.zeros(10, 10)[:, ::2], "its strides .10, 2. leave gaps"),
        (lambda: torch.zeros(1).expand(16), "its strides .0,. leave gaps or overlap"),
    ],
)
def test_what_cannot_be_shared(make, reason):
    x = make()
    with pytest.raises(ValueError, match=f"x: cannot share its memory with JAX: {reason}"):
        interop.to_jax(x, copy=False)
    for copy in (None, True):
        np.testing.assert_array_equal(interop.to_jax(x, copy=copy), x)


def test_lazy_and_strange_tensors():
    z = torch.tensor([1 + 2j, 3 - 1j])
    np.testing.assert_array_equal(interop.to_jax(z.conj()), [1 - 2j, 3 + 1j])
    np.testing.assert_array_equal(interop.to_jax(z.conj().imag), [-2, 1])  # a negative-bit view
    assert interop.to_jax(torch.ones(2, requires_grad=True) * 2).tolist() == [2, 2]
    assert interop.to_jax(torch.tensor(3.0)).shape == ()
    assert interop.to_jax(torch.zeros(0, 3)).shape == (0, 3)
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for copy in (True, None):
        array = interop.to_jax(image, copy=copy)
        np.testing.assert_array_equal(array, image)
        np.testing.assert_array_equal(jax.jit(lambda a: a + 1)(array), image + 1)


def test_trees():
    tree = {"a": [torch.ones(2), None], "b": (torch.zeros(1),)}
    arrays = interop.to_jax(tree)
    assert arrays["a"][1] is None
    assert isinstance(arrays["b"], tuple)
    assert arrays["a"][0].tolist() == [1, 1]
    assert torch.equal(interop.to_torch(arrays)["a"][0], torch.ones(2))
    with pytest.raises(TypeError, match=r"x\['a'\]\[0\]: expected a torch tensor, found float"):
        interop.to_jax({"a": [1.0]})
    with pytest.raises(TypeError, match=r"x\['b'\]: torch.float64 would be narrowed"):
        interop.to_jax({"b": torch.ones(1, dtype=torch.float64)})


class Overriding(torch.Tensor):
    """With operations of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.eye(2).to_sparse(), "x: expected a dense tensor, found layout torch.sparse_coo; use .to_dense"),
        (lambda: torch.ones(2, device="meta"), "x: expected a tensor in CPU memory or on a GPU, found the meta device"),
        (lambda: torch.ones(1).as_subclass(Overriding), "x: expected a plain tensor, found .*Overriding;"),
        (lambda: np.ones(2), "x: expected a torch tensor, found ndarray"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(TypeError, match=text):
        interop.to_jax(make())


@pytest.mark.filterwarnings("ignore")
def test_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        x = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(
            TypeError, match=r"x: expected a plain tensor, found torch.distributed.tensor.DTensor; .*to_local"
        ):
            interop.to_jax(x)
        assert interop.to_jax(x.to_local()).tolist() == [1, 1, 1, 1]
        del x
    finally:
        dist.destroy_process_group()


def test_to_torch_refuses_what_torch_has_not():
    with pytest.raises(TypeError, match="x: torch has no type for key<fry>"):
        interop.to_torch(jax.random.key(0))
    with pytest.raises(TypeError, match="x: expected a JAX array, found ndarray"):
        interop.to_torch(np.ones(2))
    with pytest.raises(TypeError, match="x: expected a JAX array"):
        jax.jit(interop.to_torch)(jnp.ones(2))


def test_a_shared_view_keeps_donation_from_being_in_place():
    """Why the compiled step makes its views by address: this one would silently cost a copy."""
    array = jnp.zeros(1000)
    view = interop.to_torch(array, copy=False)
    out = jax.jit(lambda a: a + 1, donate_argnums=0)(array)
    assert out.unsafe_buffer_pointer() != view.data_ptr()
    buffer = memory.HOST.buffer(1000, np.dtype(np.float32))
    view = buffer.view(torch.float32, (1000,))
    memory.HOST.replace([buffer], [jax.block_until_ready(jax.jit(lambda a: a + 1, donate_argnums=0)(buffer.array))])
    assert buffer.array.unsafe_buffer_pointer() == view.data_ptr()
    assert view.sum() == 1000


def test_an_alias_sees_what_is_written_to_its_memory():
    x = cpu.aligned_zeros(1000, np.dtype(np.float32))
    alias = memory.HOST.alias(x)
    assert isinstance(alias, jax.Array)
    assert alias.unsafe_buffer_pointer() == x.ctypes.data
    x[:] = 1
    double = jax.jit(lambda a: 2 * a)
    assert (double(alias) == 2).all()
    unaligned = x.view(np.uint8)[1:].copy()[3:]
    assert (double(memory.HOST.alias(unaligned)) == 2 * unaligned).all()


def test_a_buffer_held_elsewhere_is_still_what_torch_sees():
    buffer = memory.HOST.buffer(1000, np.dtype(np.float32))
    view = buffer.view(torch.float32, (1000,))
    held = torch.from_dlpack(buffer.array)  # now XLA may not donate it
    memory.HOST.replace([buffer], [jax.block_until_ready(jax.jit(lambda a: a + 1, donate_argnums=0)(buffer.array))])
    assert view.sum() == held.sum() == 1000
    del held
    memory.HOST.replace([buffer], [jax.block_until_ready(jax.jit(lambda a: a + 1, donate_argnums=0)(buffer.array))])
    assert view.sum() == 2000
