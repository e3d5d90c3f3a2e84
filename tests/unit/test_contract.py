"""What PyTorch's machinery may ask of the op, whichever backend runs: compilers, transforms, repeats, processes.

Whole models under exporters and compilers are in test_export.py.
"""

import contextlib
import socket

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from timm_halonet.layers import HaloAttention
from timm_halonet.ops import BACKENDS, halo_attention, use_backend

FAST = [name for name in BACKENDS if name != "reference"]
B, H, HEADS, DIM, DIM_V = 4, 1, 2, 8, 16
OPTIONS = dict(block_size=B, halo_size=H)
SIZE = (9, 14)


def device_for(backend, dtype=torch.float32):
    """The GPU if the backend runs there, else the CPU; skips where it runs on neither."""
    for device in ["cuda"] * torch.cuda.is_available() + ["cpu"]:
        reason = BACKENDS[backend][1](torch.empty(0, device=device, dtype=dtype))
        if reason is None:
            return device
    pytest.skip(reason)


def tensors(backend="reference", *lead, dtype=torch.float32, grad=False, batch=2, size=SIZE, stride=1, tables=()):
    device = device_for(backend, dtype)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_(grad)

    height, width = size
    rows = 2 * (B + 2 * H) - 1
    return (
        randn(*lead, batch, -(-height // stride), -(-width // stride), HEADS, DIM),
        randn(*lead, batch, height, width, HEADS, DIM),
        randn(*lead, batch, height, width, HEADS, DIM_V),
        randn(*tables, rows, DIM),
        randn(*tables, rows, DIM),
    )


def attend(backend, **kwargs):
    return lambda *args: halo_attention(*args, **{**OPTIONS, **kwargs}, backend=backend)


def gradients(f, args):
    args = [x.detach().requires_grad_() for x in args]
    out = f(*args)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), args)]


def equal(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, atol=tolerance * float(e.abs().max()), rtol=0)


# ---- compilers ----


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    # the reference, which takes PyTorch minutes with unknown sizes, is for exporters: see test_export.py
    [
        (backend, dynamic)
        for backend in BACKENDS
        for dynamic in (False, True)
        if (backend, dynamic) != ("reference", True)
    ],
)
def test_compile_keeps_one_op(backend, dynamic):
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    f = attend(backend, query_stride=2)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep))
    for size in [(9, 14), (12, 7), (16, 33)] if dynamic else [(9, 14)]:
        args = tensors(backend, size=size, stride=2)
        equal(gradients(compiled, args), gradients(f, args))
    ops = [sum("timm_halonet" in target for target in graph) for graph in graphs]
    # the forward's graph, and the backward's; the reference is plain operators
    assert ops == ([1, 1] if backend != "reference" else [0, 0])


@pytest.mark.parametrize("backend", FAST)
def test_a_compiled_graph_is_checked_too(backend):
    """It calls the custom op, which finds what `halo_attention` refuses; so does the op of the backward."""
    args, options = tensors(backend), (B, H, 1, 0.4, False, True, 1)
    op = getattr(torch.ops.timm_halonet, f"halo_attention_{backend}")
    backward = getattr(torch.ops.timm_halonet, f"halo_attention_{backend}_backward")
    out, *saved = op(*args, *options)
    for i, wrong, message in (
        (3, args[3].to(torch.int32), "rel_height must be .*, got torch.int32"),
        (4, args[4][1:], r"rel_width must be \(11, 8\)"),
        (0, args[0][:, 1:], r"q must be \(2, 9, 14, 2\)"),
        (2, args[2].double(), "q torch.float32 and v torch.float64"),
    ):
        changed = [*args[:i], wrong, *args[i + 1 :]]
        with pytest.raises(ValueError, match=message):
            op(*changed, *options)
        with pytest.raises(ValueError, match=message):
            backward(out, *changed, *saved, *options)
    with pytest.raises(ValueError, match="finite"):
        op(*args, B, H, 1, float("nan"), False, True, 1)
    with pytest.raises(ValueError, match="block_size=0"):
        op(*args, 0, H, 1, 0.4, False, True, 1)
    with pytest.raises(ValueError, match="gradient of the output"):
        backward(out[:, 1:], *args, *saved, *options)


def test_compiled_functions_follow_use_backend():
    """Compiled once for each backend, whichever comes first; the custom op has no part in the reference's graph."""
    counts = []

    def keep(graph, inputs):
        counts.append(sum("timm_halonet" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attend(None), fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    args = tensors()
    expected = attend(None)(*args)
    with torch.no_grad():
        for name in (None, "reference", "blocked", None):
            with use_backend(name):
                equal([compiled(*args)], [expected])
    assert counts == [1, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_aot_module(backend, monkeypatch):
    from torch._functorch.aot_autograd import aot_module
    from torch._functorch.compilers import nop

    monkeypatch.setenv("TIMM_HALONET_BACKEND", backend)
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, block_size=B, halo_size=H).to(device_for(backend))
    x = torch.randn(2, 16, *SIZE, device=layer.q.weight.device)
    results = []
    for module in (layer, aot_module(layer, fw_compiler=nop, bw_compiler=nop)):
        layer.zero_grad()
        out = module(x)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters())])
    equal(results[1], results[0])


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export_is_plain_pytorch_whatever_is_forced(strict, monkeypatch):
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "blocked")
    torch._dynamo.reset()
    layer = HaloAttention(16, num_heads=2, block_size=B, halo_size=H).requires_grad_(False)
    x = torch.randn(2, 16, *SIZE)
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not [node for node in program.graph.nodes if "timm_halonet" in str(node.target)]
    x = torch.randn(3, 16, *SIZE)
    equal([program.module()(x)], [layer(x)])


@pytest.mark.parametrize(
    ("mask_border", "stride", "dtype"),
    [(True, 1, torch.float32), (False, 2, torch.float32), (True, 2, torch.float64), (True, 1, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", FAST)
def test_custom_op(backend, mask_border, stride, dtype):
    q, k, v, rel_height, rel_width = tensors(backend, dtype=dtype, stride=stride)
    options = (B, H, stride, 0.4, False, mask_border, stride)
    kv = torch.cat([k, v], -1).requires_grad_()
    rest = [x.requires_grad_() for x in (q, rel_height, rel_width)]
    k, v = kv.split([DIM, DIM_V], -1)  # as the layer makes them: with gaps
    name = f"halo_attention_{backend}"
    op = getattr(torch.ops.timm_halonet, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype != torch.bfloat16:  # compares with a tolerance of float32's
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (rest[0], k, v, *rest[1:], *options), test_utils=tests)
    backward = getattr(torch.ops.timm_halonet, f"{name}_backward").default
    args = [x.detach() for x in (rest[0], k, v, *rest[1:])]
    out, *saved = op(*args, *options)
    grad = torch.randn_like(out)
    torch.library.opcheck(backward, (grad, *args, *saved, *options), test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, half, compiled):
    device = device_for(backend, half)
    if device == "cpu" and device_for(backend) != "cpu":
        pytest.skip("another device for float32")

    def f(*args):
        with torch.autocast(device, half):
            return halo_attention(*args, **OPTIONS, backend=backend)

    torch._dynamo.reset()
    args = tensors(backend)
    if compiled:
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    out, *grads = gradients(f, args)
    assert out.dtype == half
    assert {grad.dtype for grad in grads} == {torch.float32}
    exact = gradients(attend("reference"), args)
    equal([out.float(), *grads], exact, 0.05)
    args = [x.double() for x in args]
    if BACKENDS[backend][1](args[0]) is None:
        assert f(*args).dtype == torch.float64  # as PyTorch's own operators: no autocast from float64


# ---- transforms ----


class Count(TorchDispatchMode):
    """How often the op is called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "timm_halonet" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, None, None), (1, None, 3, None, None), (2, 0, None, 0, None)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend, in_dims):
    """Over an extra dimension it is a loop's results, in one call where the tables have none."""
    n = 3
    f = attend(backend)
    plain, many = tensors(backend), tensors(backend, n, tables=(n,))
    args = [x if dim is None else y.movedim(0, dim) for x, y, dim in zip(plain, many, in_dims, strict=True)]

    def loop(*args):
        picked = [[x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)] for i in range(n)]
        return torch.stack([f(*one) for one in picked])

    mapped = torch.vmap(f, in_dims)
    equal(gradients(mapped, args), gradients(loop, args))
    if backend != "reference":
        with Count() as count:
            mapped(*args)
        assert count.calls == (1 if in_dims[3] is None else n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend):
    args = [x.requires_grad_() for x in tensors(backend)]
    out = attend(backend)(*args)
    grads = torch.randn(3, *out.shape, device=out.device)
    batched = torch.autograd.grad(out, args, grads, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(out, args, grad, retain_graph=True) for grad in grads]
    equal(batched, [torch.stack(x) for x in zip(*loop, strict=True)])


def second_derivative(f, args):
    args = [x.detach().requires_grad_() for x in args]
    (grad,) = torch.autograd.grad(f(*args).square().sum(), args[:1], create_graph=True)
    return torch.autograd.grad(grad.square().sum(), args[1])


OTHER_DERIVATIVES = {
    "second": second_derivative,
    "torch.func.grad": lambda f, args: torch.func.grad(lambda *x: f(*x).square().sum())(*args),
    "torch.func.vmap of grad": lambda f, args: torch.func.vmap(torch.func.grad(lambda q: f(q, *args[1:]).sum()))(
        args[0][None]
    ),
    "torch.func.jvp": lambda f, args: torch.func.jvp(f, args, args),
    "forward mode": lambda f, args: torch.autograd.functional.jvp(f, args, args, strict=True),
}
MESSAGE = "differentiable once, and in reverse mode.*backend='reference'"


@pytest.mark.parametrize("what", OTHER_DERIVATIVES)
@pytest.mark.parametrize("backend", FAST)
def test_other_derivatives_are_refused(backend, what):
    args = tensors(backend)
    derive = OTHER_DERIVATIVES[what]
    with pytest.raises(RuntimeError, match=MESSAGE):
        derive(attend(backend), args)
    derive(attend("reference"), args)


def test_a_layer_says_how_to_get_other_derivatives(monkeypatch):
    layer = HaloAttention(16, num_heads=2, block_size=B, halo_size=H)
    x = torch.randn(1, 16, 5, 6)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match="TIMM_HALONET_BACKEND=reference"):
        torch.func.grad(loss)(parameters)
    monkeypatch.setenv("TIMM_HALONET_BACKEND", "reference")
    grads = torch.func.grad(loss)(parameters)
    loss(dict(layer.named_parameters())).backward()
    equal([grads[name] for name, _ in layer.named_parameters()], [p.grad for p in layer.parameters()])


def tiny_halonet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        "halonet_h0", depths=1, base_width=32, stem_chs=16, zero_init_last=False, num_classes=3, **kwargs
    )


@pytest.mark.parametrize("kwargs", [{}, dict(stride=2), dict(mask_border=False, strided_rel="grid")], ids=str)
def test_second_derivatives_of_a_layer_with_the_reference(kwargs):
    layer = HaloAttention(16, num_heads=2, dim_head=2, block_size=2, halo_size=1, backend="reference", **kwargs)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer.double(), x, fast_mode=True)


@pytest.mark.parametrize("how", ["argument", "attribute", "context"])
def test_a_gradient_penalty(how):
    """The derivative of the norm of the images' gradient, against a difference quotient."""
    model = tiny_halonet(backend="reference" if how == "argument" else None).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    if how == "attribute":
        with pytest.raises(RuntimeError, match=r"second derivative.*timm.create_model.*use_backend\('reference'\)"):
            penalty().backward()
        for layer in model.modules():
            if isinstance(layer, HaloAttention):
                layer.backend = "reference"
    with use_backend("reference" if how == "context" else None):
        penalty().backward()
        table = model.stages[0][0].self_attn.pos_embed.height_rel
        step, found = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                table[13, 2] += sign * step * (2 if sign < 0 else 1)
            found.append(penalty().item())
    assert table.grad[13, 2].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-4)


def test_adahessian():
    """timm's optimizer that needs second derivatives, with the reference; a step is that of the context's."""
    x, after = torch.randn(2, 3, 32, 32), []
    for argument, context in (("reference", None), (None, "reference")):
        model = tiny_halonet(backend=argument)
        optimizer = timm.optim.create_optimizer_v2(model, opt="adahessian", lr=0.1)
        before = model.stages[3][0].self_attn.pos_embed.width_rel.detach().clone()
        with use_backend(context):
            model(x).square().sum().backward(create_graph=True)
            optimizer.step()
        table = model.stages[3][0].self_attn.pos_embed.width_rel.detach()
        assert table.isfinite().all() and not table.equal(before)
        after.append(table)
    torch.testing.assert_close(*after)
    model = tiny_halonet()
    model(x).square().sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        timm.optim.create_optimizer_v2(model, opt="adahessian").step()


def test_a_layer_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="'referenc'; there are native"):
        HaloAttention(16, num_heads=2, backend="referenc")
    with pytest.raises(ValueError, match="'referenc'"):
        timm.create_model("halonet_h0", backend="referenc")


# ---- training machinery ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend, dtype):
    args = tensors(backend, dtype=dtype, size=(33, 26))
    torch.use_deterministic_algorithms(True)
    try:
        first, *again = [gradients(attend(backend), args) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, e) for results in again for a, e in zip(results, first, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend, use_reentrant):
    f, args = attend(backend), tensors(backend)
    results = gradients(lambda *x: checkpoint(f, *x, use_reentrant=use_reentrant) if not use_reentrant else f(*x), args)
    if use_reentrant:  # takes part only in .backward()
        leaves = [x.detach().requires_grad_() for x in args]
        out = checkpoint(f, *leaves, use_reentrant=True)
        out.square().mean().backward()
        results = [out.detach(), *(x.grad for x in leaves)]
    assert all(torch.equal(a, e) for a, e in zip(results, gradients(f, args), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_inputs_need_no_gradient(backend):
    args = tensors(backend)
    expected = gradients(attend(backend), args)
    for i in range(5):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(args)]
        out = attend(backend)(*leaves)
        out.square().mean().backward()
        equal([leaves[i].grad], [expected[1 + i]])
        assert [x.grad is None for x in leaves] == [i != j for j in range(5)]
    with torch.inference_mode():
        assert torch.equal(attend(backend)(*args), expected[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend):
    if device_for(backend) != "cuda":
        pytest.skip(f"{backend} does not run on the GPU")
    static = [x.requires_grad_() for x in tensors(backend)]
    grad = torch.randn(*static[0].shape[:4], DIM_V, device="cuda")

    def step():
        out = attend(backend)(*static)
        return out, *torch.autograd.grad(out, static, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x in static:
            x.copy_(torch.randn_like(x))
    graph.replay()
    equal(results, step())


def work(rank, port, folder):
    """One of two processes: a step on its half of the batch, its gradients to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model, x = distributed_case()
        ddp = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second forward raises where the first left a parameter out
            model.zero_grad()
            ddp(x[rank::2]).square().mean().backward()
        torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def distributed_case():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), HaloAttention(16, num_heads=2, block_size=B, halo_size=H), HaloAttention(16)]
    return nn.Sequential(*layers), torch.randn(4, 3, *SIZE)


@pytest.mark.integration
def test_two_processes_have_the_gradients_of_one(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    model, x = distributed_case()
    model(x).square().mean().backward()
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    equal(first, [p.grad for p in model.parameters()])


def test_the_tables_come_from_their_module():
    """Offloading and sharding fetch a module's parameters in hooks around its forward, and nowhere else."""
    torch.manual_seed(0)
    layer, x = HaloAttention(16, num_heads=2, block_size=4, halo_size=1), torch.randn(1, 16, 8, 8)
    expected = layer(x)
    kept = {name: p.detach().clone() for name, p in layer.pos_embed.named_parameters()}

    def fetch(module, args):
        for name, p in module.named_parameters():
            p.data = kept[name].clone()

    def drop(module, args, output):
        return tuple(p.clone() for p in output)

    for p in layer.pos_embed.parameters():
        p.data.fill_(1e8)
    layer.pos_embed.register_forward_pre_hook(fetch)
    layer.pos_embed.register_forward_hook(drop)
    torch.testing.assert_close(layer(x), expected)
    assert list(layer.pos_embed.state_dict()) == ["height_rel", "width_rel"]
