"""Functions of windows (B, N, E): those that work row by row, and those that look along time."""

import keras
import numpy as np
from keras import layers as kl
from keras import ops

N, E = 4, 8
MATRIX = np.linspace(-1, 1, E * 3).reshape(E, 3).astype("float32")
ROW = np.linspace(-1, 1, E).astype("float32")

CASES = {}
# What a session has no node for.
ONLY_IN_KERAS = {}
TIME = {}  # Functions that look along time.


def _every(table, **functions):
    table.update(functions)


def _batched(names, count):
    return [names[i : i + count] for i in range(0, len(names), count)]


def _of(domain, *names):
    """Add ops of one tensor by their names, on numbers that `domain` makes of normal ones."""
    for some in _batched(names, 8):
        CASES[" ".join(some)] = lambda x, some=some: [getattr(ops, f)(domain(x)) for f in some]


def _of_two(*names):
    """Add ops of two tensors by their names."""

    def calls(f, x):
        number, row = np.float32(0.3), ROW + 2
        return [f(x, 0.3 - 0.7 * x), f(x, np.full(1, number)), f(x, row), f(row[None, None], x)]

    for some in _batched(names, 4):
        CASES[" ".join(some)] = lambda x, some=some: [
            y for name in some for y in calls(getattr(ops, name), x)
        ]


# Element by element.

_of(
    lambda x: x,
    "abs", "absolute", "arcsinh", "arctan", "cbrt", "ceil", "conj", "cos", "cosh", "deg2rad",
    "erf", "erfc", "exp", "exp2", "expm1", "floor", "imag", "isfinite", "isinf", "isnan",
    "isneginf", "isposinf", "logical_not", "negative", "ones_like", "rad2deg", "real",
    "reciprocal", "round", "sign", "sin", "sinc", "sinh", "square", "stop_gradient", "tan", "tanh",
    "trunc", "zeros_like", "nan_to_num",
)  # fmt: skip
_of(ops.tanh, "arccos", "arcsin", "arctanh")
_of(lambda x: 1 + x * x, "arccosh", "log", "log10", "log1p", "log2", "rsqrt", "sqrt")
_of(
    lambda x: 2 * x,
    "celu", "elu", "gelu", "glu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh",
    "leaky_relu", "log_sigmoid", "log_softmax", "relu", "relu6", "selu", "sigmoid", "silu",
    "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus", "sparse_sigmoid", "sparsemax",
    "squareplus", "tanh_shrink",
)  # fmt: skip
_of_two(
    "add", "arctan2", "divide", "divide_no_nan", "equal", "floor_divide", "fmax", "fmin", "fmod",
    "greater", "greater_equal", "heaviside", "hypot", "isclose", "less", "less_equal", "logaddexp",
    "logaddexp2", "logical_and", "logical_or", "logical_xor", "maximum", "minimum", "mod",
    "multiply", "not_equal", "subtract", "true_divide",
)  # fmt: skip
_every(
    CASES,
    fabs=lambda x: ops.fabs(x),
    power=lambda x: [ops.power(ops.abs(x), 1.5), ops.power(2.0, x), x**2],
    clip=lambda x: ops.clip(x, -0.5, 1),
    clip_by_rows=lambda x: ops.clip(x, ROW - 1, ROW),
    threshold=lambda x: ops.threshold(x, 0.2, -1.0),
    cast=lambda x: ops.cast(ops.cast(3 * x, "int32"), "float32"),
    copy=lambda x: ops.copy(x),
    full_like=lambda x: [ops.full_like(x, 2.5), x + ops.full_like(x, 1)],
    rounded=lambda x: [ops.round(3 * x, 1), ops.round(x, 2)],
    where=lambda x: [
        ops.where(x > 0, x, 0.1 * x), ops.where(x > ROW, ROW, x), ops.where(ROW > 0, x, -x),
        ops.where(x[..., :1] > 0, x, -x),
    ],
    select=lambda x: ops.select([x > 1, x > 0], [x, 2 * x], -x),
    nan=lambda x: [
        ops.where(ops.isnan(ops.sqrt(x)), -1.0, x), ops.nan_to_num(ops.log(ops.relu(x)), nan=5.0),
        ops.cast(ops.isfinite(1 / ops.relu(x)), "float32"), ops.nan_to_num(ops.sqrt(x), 1.0, 2, 3),
    ],
    integers=lambda x: [ops.cast(3 * x, "int32") > 1, ops.equal(ops.cast(2 * x, "int32"), 1)],
    digitize=lambda x: ops.cast(ops.digitize(x, np.array([-1.0, 0.0, 0.5], "float32")), "float32"),
    of_an_open_row=lambda x: x * ROW[None, None] + ROW[None],
)  # fmt: skip
# Along features.
ONE_AXIS = ("argmax", "argmin", "norm")


def _reduction(name, **options):
    """Return a function that calls an op with these options on (B, N, E)."""
    return lambda x: getattr(ops, name)(x, **options)


def _along_features(name):
    f = getattr(ops, name)
    return lambda x: [
        f(x, axis=-1, keepdims=True), f(x, axis=2)[:, :, None], f(square(x), axis=3),
        *([] if name in ONE_AXIS else [f(square(x), axis=(2, -1), keepdims=True)]),
    ]  # fmt: skip


for _name in ("mean", "sum", "max", "min", "amax", "amin", "prod", "std", "var", "logsumexp",
              "all", "any", "median", "norm", "argmax", "argmin", "nanmax", "nanmean", "nanmin",
              "nanprod", "nansum", "ptp"):  # fmt: skip
    CASES[_name] = _along_features(_name)
    TIME[_name] = _reduction(_name, axis=1, keepdims=True)
for _name in ("mean", "max", "var", "logsumexp", "any", "norm", "median"):
    TIME[f"{_name} of all"] = _reduction(_name, keepdims=True)


def square(x):
    """Return x as rows of matrices."""
    return ops.reshape(x, (-1, N, 2, E // 2))


def cubes(x):
    """Return x as rows of two matrices."""
    return ops.reshape(x, (-1, N, 2, 2, E // 4))


def _rows(*shape):
    return np.linspace(0, 1, int(np.prod(shape))).reshape(shape).astype("float32")


_every(
    CASES,
    reductions_of_nan=lambda x: [
        getattr(ops, name)(ops.sqrt(ops.concatenate([x, ops.ones_like(x)], -1)), -1, keepdims=True)
        for name in ("nanmax", "nanmean", "nanmin", "nanprod", "nansum")
    ],
    count_nonzero=lambda x: ops.cast(ops.count_nonzero(ops.relu(x), axis=-1), "float32")[..., None],
    average=lambda x: [ops.average(x, -1)[..., None], square(x) * 1],
    quantile=lambda x: [
        ops.quantile(x, 0.3, axis=-1, keepdims=True), ops.quantile(x, 1.0, -1)[..., None]
    ],
    percentile=lambda x: ops.percentile(x, 80, axis=-1, keepdims=True),
    norms=lambda x: [
        ops.norm(x, ord, axis=-1, keepdims=True) for ord in (None, 1, 2, np.inf, -np.inf)
    ],
    norm_of_matrices=lambda x: ops.norm(square(x), "fro", axis=(2, 3), keepdims=True),
    normalize=lambda x: ops.normalize(x, axis=-1),
    softmax_of_matrices=lambda x: [ops.softmax(square(x), 2), ops.log_softmax(square(x), 3)],
    cumsum=lambda x: [ops.cumsum(x, -1), ops.cumsum(square(x), 2)],
    cumprod=lambda x: ops.cumprod(x, 2),
    diff=lambda x: [ops.diff(x), ops.diff(x, 2, axis=2)],
    sort=lambda x: [ops.sort(x), ops.sort(square(x), 2)],
    argsort=lambda x: ops.cast(ops.argsort(ops.round(x)), "float32"),
    top_k=lambda x: [*ops.top_k(x, 3)],
    top_k_of_equal=lambda x: [*ops.top_k(ops.round(x), 5)],
    one_hot=lambda x: [
        ops.one_hot(ops.argmax(x, -1), E), ops.one_hot(ops.cast(3 * x, "int32"), 3, axis=2)
    ],
    rms=lambda x: ops.rms_normalization(x, ROW),
    layer_normalization=lambda x: ops.layer_normalization(x, ROW, ROW),
)  # fmt: skip
# Moved, taken, combined.
_every(
    CASES,
    flip=lambda x: [ops.flip(x, -1), ops.flip(square(x), (2, 3))],
    roll=lambda x: [ops.roll(x, 3, axis=-1), ops.roll(square(x), (1, 2), axis=(2, 3))],
    concatenate=lambda x: ops.concatenate([x, 2 * x], -1),
    stack=lambda x: [ops.stack([x, 2 * x], -1), ops.stack([x, x], 2)],
    split=lambda x: [*ops.split(x, 2, -1), *ops.split(x, [3], 2), *ops.array_split(x, 3, -1)],
    unstack=lambda x: [y[..., None] for y in ops.unstack(x, axis=-1)],
    take=lambda x: [ops.take(x, [3, 1, -1], axis=-1), ops.take(x, 2, axis=2)[..., None]],
    slices=lambda x: [x[..., 2:5], x[:, :, ::-2], x[:, :, 1][..., None], x[:, :, None]],
    reshape=lambda x: [
        square(x), ops.reshape(square(x), (-1, N, E))
    ],
    expand_dims=lambda x: [ops.expand_dims(x, -1), ops.expand_dims(x, 2)],
    squeeze=lambda x: ops.squeeze(ops.expand_dims(x, 2), 2),
    pad=lambda x: [
        ops.pad(x, [[0, 0], [0, 0], [1, 2]]), ops.pad(x, [[0, 0], [0, 0], [2, 1]], "reflect"),
        ops.pad(x, [[0, 0], [0, 0], [2, 1]], "symmetric"),
    ],
    repeat=lambda x: [ops.repeat(x, 2, axis=-1), ops.repeat(square(x), 3, axis=2)],
    tile=lambda x: [ops.tile(x, [1, 1, 2]), ops.tile(square(x), [2, 1]), ops.tile(x, 2)],
    transpose=lambda x: ops.transpose(square(x), (0, 1, 3, 2)),
    swapaxes=lambda x: ops.swapaxes(square(x), -1, 2),
    moveaxis=lambda x: ops.moveaxis(square(x), 3, 2),
    matmul=lambda x: [ops.matmul(x, MATRIX), ops.matmul(x, ROW)[..., None]],
    dot=lambda x: [ops.dot(x, MATRIX), ops.dot(x, ROW)[..., None], ops.dot(x, 2.0)],
    dot_of_cubes=lambda x: ops.dot(x, np.stack([MATRIX, 1 - MATRIX])),
    tensordot=lambda x: [
        ops.tensordot(x, MATRIX, 1), ops.tensordot(square(x), MATRIX.reshape(2, 4, 3), 2),
        ops.tensordot(square(x), MATRIX.reshape(4, 2, 3), [[3], [0]]),
    ],
    einsum=lambda x: [
        ops.einsum("bti,ij->btj", x, MATRIX), ops.einsum("ij,bti->btj", MATRIX, x),
        ops.einsum("...i,ij->...j", x, MATRIX),
    ],
    a_scalar_a_step=lambda x: [
        (ops.mean(x, -1) * 2 + ops.sum(x, 2))[..., None] * x, ops.expand_dims(ops.exp(x[..., 0]), 2)
    ],
)  # fmt: skip
# Products of several tensors, and with fixed ones that are not a matrix on the right.
PRODUCTS = dict(
    matrices=lambda x: [
        ops.matmul(square(x), ops.swapaxes(square(x), 2, 3)),
        ops.matmul(ops.swapaxes(square(x), 2, 3), 1 - square(x)),
    ],
    matrices_of_heads=lambda x: ops.matmul(
        ops.softmax(ops.matmul(cubes(x), ops.swapaxes(cubes(x), -1, -2))), 1 - cubes(x)
    ),
    matrices_of_one_head=lambda x: ops.matmul(cubes(x), square(x)[:, :, None, :, :2]),
    fixed_matrix_first=lambda x: ops.matmul(_rows(3, 2), square(x)),
    einsum_of_two=lambda x: [
        ops.einsum("btij,btij->bti", square(x), 1 - square(x)),
        ops.einsum("btij,btkj->btki", square(x), ops.tanh(square(x))),
        ops.einsum("btij,btjk->bt", square(x), ops.swapaxes(square(x), 2, 3))[..., None],
        ops.einsum("bti,btj->btij", x, ops.tanh(x)),
        ops.einsum("...i,...i->...", x, ops.tanh(x))[..., None],
        ops.einsum("btij,btkl->btlj", square(x), square(x)),
    ],
    einsum_of_ranks=lambda x: [
        ops.einsum("btij,btj->bti", square(x), x[..., :4]),
        ops.einsum("...i,...ij->...j", x[..., 2:4], square(x)),
        ops.einsum("btij,bt->btji", square(x), ops.sum(x, -1)),
    ],
    einsum_of_three=lambda x: [
        ops.einsum("bti,ij,btj->bt", x, MATRIX, x[..., :3])[..., None],
        ops.einsum("bti,btj,btk->btkij", x[..., :2], x[..., 2:5], x[..., 3:]),
        ops.einsum("ij,btj,btk,kl->btil", MATRIX, x[..., :3], x, MATRIX),
    ],
    einsum_of_diagonals=lambda x: [
        ops.einsum("btii->bti", square(x)[..., :2]),
        ops.einsum("btii,bti->bt", square(x)[..., :2], x[..., :2])[..., None],
    ],
)  # fmt: skip
CASES.update(PRODUCTS)
# Layers.
_every(
    CASES,
    Activation=lambda x: [
        kl.Activation("softmax")(x),
        kl.Activation(ops.square)(x),
        kl.Activation(lambda y: ops.sum(y, -1, keepdims=True) * y)(x),
        kl.Activation("mish")(x),
    ],
    ActivityRegularization=lambda x: kl.ActivityRegularization()(x),
    Conv1D=lambda x: [kl.Conv1D(3, 1, activation="tanh")(x), kl.Conv1D(2, 1, use_bias=False)(x)],
    Dense=lambda x: [kl.Dense(3)(x), kl.Dense(4, activation=lambda y: ops.flip(y, -1))(x)],
    Discretization=lambda x: 1.0 * ops.cast(kl.Discretization([0.0, 0.5, 1.0])(x), "float32"),
    GroupNormalization=lambda x: kl.TimeDistributed(kl.GroupNormalization(2))(x),
    Lambda=lambda x: kl.Lambda(lambda y: ops.mean(y, -1, keepdims=True) * y)(x),
    Normalization=lambda x: kl.Normalization(mean=ROW, variance=ROW + 2)(x),
    PReLU=lambda x: [kl.PReLU(shared_axes=[1])(x), kl.PReLU(shared_axes=[1, 2])(x)],
    Rescaling=lambda x: [kl.Rescaling(ROW, -ROW)(x), kl.Rescaling(2.0)(x)],
    Reshape=lambda x: [kl.Reshape((N, 2, E // 2))(x), kl.Reshape((-1, 2, E // 2))(x)],
    Softmax=lambda x: kl.Softmax()(x),
    SpatialDropout1D=lambda x: kl.SpatialDropout1D(0.1)(x),
    SpectralNormalization=lambda x: kl.SpectralNormalization(kl.Dense(3))(x),
    UnitNormalization=lambda x: kl.UnitNormalization()(x),
)
_every(
    ONLY_IN_KERAS,
    erfinv=lambda x: ops.erfinv(ops.tanh(x)),
    nextafter=lambda x: ops.nextafter(x, 2 * x),
    signbit=lambda x: ops.signbit(x),
    i0=lambda x: ops.i0(x),
    isreal=lambda x: ops.isreal(x),
    saturate_cast=lambda x: ops.saturate_cast(3 * x, "int8"),
    nanstd=lambda x: ops.nanstd(x, axis=-1, keepdims=True),
    nanvar=lambda x: ops.nanvar(x, axis=-1, keepdims=True),
    nancumsum=lambda x: ops.nancumsum(x, axis=-1),
    nancumprod=lambda x: ops.nancumprod(x, axis=-1),
    nanargmax=lambda x: ops.nanargmax(x, axis=-1, keepdims=True),
    nanargmin=lambda x: ops.nanargmin(x, axis=-1, keepdims=True),
    nanmedian=lambda x: ops.nanmedian(x, axis=-1, keepdims=True),
    nanquantile=lambda x: ops.nanquantile(x, 0.3, axis=-1, keepdims=True),
    nanpercentile=lambda x: ops.nanpercentile(x, 30, axis=-1, keepdims=True),
    trapezoid=lambda x: ops.trapezoid(x, axis=-1)[..., None],
    take_along_axis=lambda x: ops.take_along_axis(x, ops.argsort(x), axis=-1),
    rfft=lambda x: [*ops.rfft(x)],
    fft=lambda x: [*ops.fft((x, 0 * x))],
    bitwise=lambda x: [
        f(ops.cast(3 * x, "int32"), np.array([3], "int32"))
        for f in (
            ops.bitwise_and, ops.bitwise_or, ops.bitwise_xor, ops.bitwise_left_shift,
            ops.bitwise_right_shift, ops.left_shift, ops.right_shift,
        )
    ],
    bitwise_not=lambda x: [f(ops.cast(x, "int32")) for f in (ops.bitwise_invert, ops.bitwise_not)],
    batch_normalization=lambda x: ops.batch_normalization(x, ROW, ROW + 2, -1),
)  # fmt: skip

# Along time.
_every(
    TIME,
    cumsum=lambda x: ops.cumsum(x, 1),
    cumprod=lambda x: ops.cumprod(x, -2),
    diff=lambda x: ops.diff(x, axis=1),
    flip=lambda x: ops.flip(x, 1),
    flip_all=lambda x: ops.flip(x),
    roll=lambda x: ops.roll(x, 1, axis=1),
    roll_all=lambda x: ops.roll(x, 1),
    sort=lambda x: ops.sort(x, 1),
    argsort=lambda x: ops.argsort(x, 1),
    softmax=lambda x: ops.softmax(x, axis=1),
    log_softmax=lambda x: ops.log_softmax(x, axis=-2),
    normalize=lambda x: ops.normalize(x, axis=1),
    concatenate=lambda x: ops.concatenate([x, x], 1),
    stack=lambda x: ops.stack([x, x], 1)[:, :, 0],
    split=lambda x: ops.split(x, 2, 1)[0],
    unstack=lambda x: ops.stack(ops.unstack(x, axis=1), 1),
    take=lambda x: ops.take(x, [1, 0, 3, 2], axis=1),
    take_by_tensor=lambda x: ops.take(x, ops.argmax(x, -1), axis=2)[:, :, 0],
    slices=lambda x: x[:, ::-1],
    a_row_of_rank_2=lambda x: ops.mean(x, -1)[..., ::-1][..., None],
    softmax_of_rank_2=lambda x: ops.softmax(ops.mean(x, -1))[..., None],
    softmax_layer_of_rank_2=lambda x: kl.Activation("softmax")(ops.mean(x, -1))[..., None],
    dense_of_rank_2=lambda x: kl.Dense(N)(ops.mean(x, -1))[..., None],
    repeat=lambda x: ops.repeat(x, 2, axis=1),
    tile=lambda x: ops.tile(x, [1, 2, 1]),
    pad=lambda x: ops.pad(x, [[0, 0], [1, 0], [0, 0]]),
    pad_all=lambda x: ops.pad(x, 1),
    reshape=lambda x: ops.reshape(x, (-1, E, N)),
    reshape_to_the_same_length=lambda x: ops.reshape(
        ops.reshape(x, (-1, N * E)), (-1, N, E)
    ),
    transpose=lambda x: ops.transpose(x, (0, 2, 1)),
    swapaxes=lambda x: ops.swapaxes(x, 1, 2),
    moveaxis=lambda x: ops.moveaxis(x, 1, 2),
    expand_dims=lambda x: ops.expand_dims(x, 1),
    matmul=lambda x: ops.matmul(_rows(N, N), x),
    matmul_of_two=lambda x: ops.matmul(x, ops.transpose(x, (0, 2, 1))),
    einsum=lambda x: ops.einsum("bti,ts->bsi", x, _rows(N, N)),
    einsum_of_two=lambda x: ops.einsum("bti,bsi->bts", x, x),
    einsum_of_rows=lambda x: ops.einsum("bti,ti->bti", x, _rows(N, E)),
    einsum_of_ranks=lambda x: ops.einsum("btij,bj->bti", square(x), x[:, -1, :4]),
    einsum_across_time=lambda x: ops.einsum("btij,bjt->bti", square(x), x[..., :4]),
    tensordot=lambda x: ops.tensordot(x, _rows(N, 3), [[1], [0]]),
    add_rows=lambda x: x + _rows(N, E),
    add_a_column=lambda x: x + _rows(1, N, 1),
    where_of_rows=lambda x: ops.where(_rows(N, 1) > 0.5, x, -x),
    one_for_all=lambda x: x - ops.mean(x, 1, keepdims=True),
    quantiles=lambda x: ops.quantile(x, [0.1, 0.9], axis=-1),
    one_hot=lambda x: ops.one_hot(ops.argmax(x, -1), E, axis=1),
    trapezoid=lambda x: ops.trapezoid(x, axis=1),
    trapezoid_of_rows=lambda x: ops.trapezoid(x, _rows(1, N, E), axis=-1),
    nan_to_num=lambda x: ops.nan_to_num(x, nan=_rows(N, E)),
    Normalization=lambda x: kl.Normalization((1, 2), _rows(N, E), 1 + _rows(N, E))(x),
    Discretization=lambda x: kl.Discretization([0.0], output_mode="multi_hot")(ops.mean(x, -1)),
    GroupNormalization=lambda x: kl.GroupNormalization(2)(x),
    PReLU=lambda x: kl.PReLU()(x),
    Rescaling=lambda x: kl.Rescaling(_rows(N, 1))(x),
    Reshape=lambda x: kl.Reshape((E, N))(x),
    Softmax=lambda x: kl.Softmax(axis=1)(x),
    Activation=lambda x: kl.Activation(lambda y: ops.cumsum(y, 1))(x),
    Dense=lambda x: kl.Dense(E, activation=lambda y: y - ops.mean(y, 1, keepdims=True))(x),
    Conv1D=lambda x: kl.Conv1D(E, 1, activation=lambda y: ops.softmax(y, 1))(x),
    Lambda=lambda x: kl.Lambda(lambda y: ops.flip(y, 1))(x),
    Lambda_of_the_length=lambda x: kl.Lambda(lambda y: y / y.shape[1])(x),
    Lambda_of_a_shape=lambda x: kl.Lambda(lambda y: ops.reshape(y, (-1, N, 2, E // 2)))(x),
    Permute=lambda x: kl.Permute((2, 1))(x),
    UnitNormalization=lambda x: kl.UnitNormalization(axis=1)(x),
    map=lambda x: ops.map(lambda row: row, x),
)  # fmt: skip


def rows_of(y):
    """Return a function's outputs as one tensor of float32 rows (B, N, features)."""
    rows = []
    for part in y if isinstance(y, (list, tuple)) else [y]:
        part = part if part.dtype == "float32" else ops.cast(part, "float32")
        if len(part.shape) != 3:
            part = ops.reshape(part, (-1, N, int(np.prod(part.shape[2:]))))
        rows.append(part)
    return ops.concatenate(rows, -1) if len(rows) > 1 else rows[0]


def model_of(function):
    """Return a model with a function of windows below attention, and the newest row of both."""
    keras.utils.set_random_seed(3)
    x = keras.Input((N, E))
    y = rows_of(function(x))
    attended = kl.MultiHeadAttention(2, 4)(kl.Dense(E)(y), y)[:, -1]
    model = keras.Model(x, [y[:, -1], attended])
    random = np.random.default_rng(3)
    for w in model.weights:
        if "seed" not in w.path and w.dtype == "float32":
            w.assign(w + 0.1 * random.normal(size=w.shape))
    return model
