import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import RACE, gpu_interpreter, needs_gpu_interpreter

from jpaged.pallas_kernels import mosaic_gpu as device
from jpaged.pallas_kernels.linear import linear, num_splits, unsupported_reasons
from jpaged.pallas_kernels.linear import mosaic_gpu as kernel
from jpaged.pallas_kernels.linear.mosaic_gpu import Config

# The package of that name is hidden by its function.
API = importlib.import_module("jpaged.pallas_kernels.linear.api")
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32

# Relative to the largest output. Sums of up to 512 exact products, in another order; one rounding
# of the output; with an activation on XLA two more, of gate and up.
SUM_TOLERANCE = 1e-6
ROUND_TOLERANCES = {F32: 1e-6, F16: 1e-3, BF16: 8e-3}

# A decode step of Llama-3-8B: depth, columns, activation, transposed.
SHAPES = {
    "qkv": (4096, 6144, None, False),
    "o": (4096, 4096, None, False),
    "gate_up": (4096, 28672, "silu_mul", False),
    "down": (14336, 4096, None, False),
    "lm_head": (4096, 128256, None, True),
}


@pytest.fixture
def interpret():
    """Parameters of the interpreter, whose state no failed test may leave to the next."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    yield gpu_interpreter
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def _operands(m, k, n, dtype):
    rng = np.random.default_rng(m + k + n)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in ((m, k), (k, n)))


def _expected(x, w, activation=None):
    out = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    if activation is None:
        return out
    gate, up = np.split(out, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def _assert_close(actual, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=atol, rtol=0)


KERNEL_CASES = {
    "one_split": (8, 128, 128, Config(tile_n=64, stages=2), {}),
    "splits": (16, 256, 128, Config(tile_n=64, stages=2, num_splits=4), {}),
    "one_row": (1, 128, 64, Config(tile_n=64), {}),
    "rows_not_of_8": (13, 128, 64, Config(tile_n=64, stages=3), {}),
    "transposed_silu_mul": (
        8,
        128,
        256,
        Config(tile_n=128, stages=2),
        {"transposed": True, "activation": "silu_mul"},
    ),
    "transposed": (8, 128, 128, Config(tile_n=128, stages=2), {"transposed": True}),
    "silu_mul": (5, 128, 256, Config(tile_n=128, stages=2), {"activation": "silu_mul"}),
    "silu_mul_of_224": (8, 128, 224, Config(tile_n=224, stages=2), {"activation": "silu_mul"}),
    "columns_shared": (8, 128, 128, Config(tile_n=128, consumers=2, consumers_n=2), {}),
    "rows_shared": (70, 128, 128, Config(tile_n=64, stages=2, consumers=2), {}),
    "three_consumers": (130, 64, 64, Config(tile_n=64, stages=2, consumers=3), {}),
    "128_rows_each": (129, 64, 64, Config(tile_n=64, stages=2, consumers=2, rows=128), {}),
    "row_tiles": (256, 64, 64, Config(tile_n=64, stages=2, consumers=2), {}),
    "bands": (320, 64, 128, Config(tile_n=64, stages=2, band=2), {}),
    "cluster": (64, 128, 128, Config(tile_n=64, stages=2, cluster=2), {}),
    "no_overlap": (8, 192, 64, Config(tile_n=64, stages=2, in_flight=0), {}),
    "deep_stages": (8, 256, 64, Config(tile_n=64, tile_k=128, stages=2), {}),
    "deep_splits": (8, 512, 64, Config(tile_n=64, tile_k=128, stages=2, num_splits=2), {}),
    "deep_transposed": (
        8,
        256,
        64,
        Config(tile_n=64, tile_k=128, stages=2),
        {"transposed": True},
    ),
}


@needs_gpu_interpreter
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_equals_float64(case, interpret):
    m, k, n, config, options = KERNEL_CASES[case]
    x, w = _operands(m, k, n, BF16)
    stored = w.T if options.get("transposed") else w
    out = kernel.linear(x, stored, config=config, out_dtype=F32, interpret=interpret(), **options)
    columns = n // 2 if options.get("activation") else n
    assert out.shape == (config.num_splits, m, columns)
    _assert_close(out.sum(axis=0), _expected(x, w, options.get("activation")), SUM_TOLERANCE)


@needs_gpu_interpreter
@pytest.mark.parametrize("activation", [None, "silu_mul"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_kernel_rounds_once(dtype, activation, interpret):
    x, w = _operands(8, 128, 128, dtype)
    config = Config(tile_n=128, stages=2)
    out = kernel.linear(
        x, w, config=config, activation=activation, out_dtype=dtype, interpret=interpret()
    )
    assert out.dtype == dtype
    _assert_close(out[0], _expected(x, w, activation), ROUND_TOLERANCES[dtype])


@needs_gpu_interpreter
def test_partial_sums_are_those_of_consecutive_depths(interpret):
    x, w = _operands(8, 256, 64, BF16)
    config = Config(tile_n=64, stages=2, num_splits=2)
    out = kernel.linear(x, w, config=config, out_dtype=F32, interpret=interpret())
    for part, depth in enumerate((slice(0, 128), slice(128, 256))):
        _assert_close(out[part], _expected(x[:, depth], w[depth]), SUM_TOLERANCE)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("k", "n", "config", "out_dtype"),
    [
        (192, 320, Config(tile_n=64, stages=2, in_flight=0), F32),
        (192, 320, Config(tile_n=64, stages=2, in_flight=1), F32),
        (64, 576, Config(tile_n=192), BF16),  # three pieces of output a tile
    ],
)
def test_persistent_programs_have_no_races(k, n, config, out_dtype, interpret, monkeypatch, capfd):
    monkeypatch.setattr(device, "num_sms", lambda: 2)  # so programs take several tiles each
    kernel._kernel.cache_clear()
    x, w = _operands(8, k, n, BF16)
    out = kernel.linear(
        x, w, config=config, out_dtype=out_dtype, interpret=interpret(detect_races=True)
    )
    kernel._kernel.cache_clear()
    tolerance = SUM_TOLERANCE if out_dtype == F32 else ROUND_TOLERANCES[BF16]
    _assert_close(out[0].astype(F32), _expected(x, w), tolerance)
    assert RACE not in capfd.readouterr().out


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("name", "m"),
    [(name, m) for name in SHAPES for m in (1, 64, 128, 192, 256, 384, 640, 1024)]
    + [("gate_up", m) for m in (1280, 16384)],
)
def test_chosen_config_lowers_for_cuda(name, m):
    k, n, activation, transposed = SHAPES[name]
    config = kernel.choose_config(m, k, n, activation=activation)
    call = functools.partial(
        kernel.linear,
        config=config,
        transposed=transposed,
        activation=activation,
        out_dtype=F32 if config.num_splits > 1 else BF16,
    )
    x = jax.ShapeDtypeStruct((m, k), BF16)
    w = jax.ShapeDtypeStruct((n, k) if transposed else (k, n), BF16)
    lowered = jax.jit(call).trace(x, w).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", ["qkv", "o", "down"])
@pytest.mark.parametrize("m", [1, 64, 128, 256, 896])
def test_narrow_weights_are_split_to_fill_the_chip(m, name):
    k, n, *_ = SHAPES[name]
    config = kernel.choose_config(m, k, n)
    assert config.num_programs(m, n) >= 0.7 * device.num_sms()


def test_only_the_activation_takes_many_rows():
    assert kernel.unsupported_reasons(16384, 4096, 28672, BF16, activation="silu_mul") == []
    assert kernel.choose_config(16384, 4096, 28672, activation="silu_mul").band == 16
    assert kernel.choose_config(1024, 4096, 28672, activation="silu_mul").band is None
    (reason,) = kernel.unsupported_reasons(65537, 4096, 28672, BF16, activation="silu_mul")
    assert "65536 rows, got 65537" in reason


@pytest.mark.parametrize(("m", "k", "tile_k"), [(8, 4096, 128), (8, 4096 + 64, 64), (96, 4096, 64)])
def test_only_the_smallest_tile_has_deep_stages(m, k, tile_k):
    assert kernel.choose_config(m, k, 4096).tile_k == tile_k


@pytest.mark.parametrize("wanted", [1, 2, 7])
def test_a_number_of_splits_is_kept(wanted):
    assert kernel.choose_config(8, 64 * 14, 4096, num_splits=wanted).num_splits == wanted


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", [None, "silu_mul"])
@pytest.mark.parametrize("transposed", [False, True])
def test_xla_equals_float64(transposed, activation, dtype):
    x, w = _operands(5, 96, 128, dtype)
    out = linear(
        x,
        w.T if transposed else w,
        transposed=transposed,
        activation=activation,
        implementation="xla",
    )
    assert out.dtype == dtype
    _assert_close(out, _expected(x, w, activation), ROUND_TOLERANCES[dtype])


@pytest.mark.parametrize("transposed", [False, True])
def test_xla_partial_sums_are_those_of_consecutive_depths(transposed):
    x, w = _operands(5, 96, 32, BF16)
    out = linear(
        x, w.T if transposed else w, transposed=transposed, num_splits=3, implementation="xla"
    )
    assert out.dtype == F32
    for part in range(3):
        depth = slice(32 * part, 32 * part + 32)
        _assert_close(out[part], _expected(x[:, depth], w[depth]), SUM_TOLERANCE)


def test_xla_has_nothing_to_split():
    assert num_splits(64, 4096, 4096, implementation="xla") == 1


def test_output_dtype_is_kept():
    x, w = _operands(4, 64, 64, BF16)
    assert linear(x, w, out_dtype=F32, implementation="xla").dtype == F32


@pytest.mark.skipif(bool(device.device_reasons()), reason="needs a GPU that runs Mosaic kernels")
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 256, 1024])
@pytest.mark.parametrize("name", ["qkv", "gate_up", "down"])
def test_gpu_equals_float64(name, m):
    k, n, activation, _ = SHAPES[name]
    x, w = _operands(m, k, n, BF16)
    out = linear(x, w, activation=activation, implementation="mosaic_gpu")
    _assert_close(out, _expected(x, w, activation), ROUND_TOLERANCES[BF16])


@pytest.mark.parametrize(
    ("problem", "options", "reason"),
    [
        ((8, 64, 64, F32), {}, "dtype must be bfloat16 or float16, got float32"),
        ((1025, 64, 64, BF16), {}, "serves 1 to 1024 rows, got 1025"),
        ((8, 96, 64, BF16), {}, "the depth must be a multiple of 64, got 96"),
        ((8, 192, 64, BF16), {"num_splits": 2}, "num_splits must divide the 3 steps"),
        ((8, 64, 96, BF16), {}, "the columns must be a multiple of 64, got 96"),
        ((8, 64, 192, BF16), {"activation": "silu_mul"}, "multiple of 128, got 192"),
    ],
)
def test_reasons_of_the_kernel(problem, options, reason, monkeypatch):
    monkeypatch.setattr(API, "device_reasons", lambda: ())
    assert kernel.unsupported_reasons(8, 64, 128, BF16) == []
    (found,) = kernel.unsupported_reasons(*problem, **options)
    assert reason in found
    assert unsupported_reasons(*problem, **options) == [found]


def test_a_named_implementation_never_falls_back(monkeypatch):
    monkeypatch.setattr(API, "device_reasons", lambda: ())
    x, w = _operands(8, 96, 64, BF16)
    with pytest.raises(NotImplementedError, match=r"linear: mosaic_gpu cannot run here: .*depth"):
        linear(x, w, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 8), (4, 8)), {}, "x must be .m, k. and w .k, n."),
        (((4, 8), (8, 4)), {"transposed": True}, "x must be .m, k. and w .k, n."),
        (((4, 8), (8, 4)), {"activation": "gelu"}, "activation must be None or 'silu_mul'"),
        (((4, 8), (8, 3)), {"activation": "silu_mul"}, "even number of columns"),
        (((4, 8), (8, 4)), {"num_splits": 3}, "num_splits must divide the depth 8, got 3"),
        (((4, 8), (8, 4)), {"num_splits": 0}, "num_splits must divide the depth 8, got 0"),
        (((4, 8), (8, 4)), {"num_splits": 2, "activation": "silu_mul"}, "needs whole sums"),
        (((4, 8), (8, 4)), {"num_splits": 2, "out_dtype": BF16}, "partial sums are float32"),
    ],
)
def test_contradictions_are_refused(shapes, options, message):
    x, w = (jnp.zeros(shape, BF16) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear(x, w, **options)


def test_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="one dtype, got bfloat16 and float32"):
        linear(jnp.zeros((4, 8), BF16), jnp.zeros((8, 4), F32))


@pytest.mark.parametrize(
    ("k", "n", "config", "options", "message"),
    [
        (128, 64, Config(tile_n=64, num_splits=4), {}, "does not divide a depth of 128"),
        (128, 96, Config(tile_n=64), {}, "does not divide 96 columns"),
        (128, 64, Config(tile_n=64, cluster=2), {}, "does not divide 64 columns"),
        (128, 64, Config(tile_n=64, consumers=3, consumers_n=2), {}, "consumers_n must divide"),
        (
            128,
            128,
            Config(tile_n=128, num_splits=2),
            {"activation": "silu_mul"},
            "silu_mul needs whole sums",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(k, n, config, options, message):
    x, w = _operands(8, k, n, BF16)
    with pytest.raises(ValueError, match=message):
        kernel.linear(x, w, config=config, out_dtype=F32, **options)


def test_no_tile_is_an_error():
    with pytest.raises(ValueError, match="no tile fits m=8, k=64, n=100"):
        kernel.choose_config(8, 64, 100)
