"""The affine form of a projection: what is read is what `forward` computes, what is written is what is read."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hyperproto import ArgumentError, HypersphericalHead, convert_model, describe, fit_head, to_linear
from hyperproto.affine import affine, affine_state, known_layers, layers_of, set_affine_
from hyperproto.conversion.warm_start import warm_start_
from hyperproto.projection import build_projection

FEATURES, DIM = 7, 4


def with_statistics(projection: nn.Module) -> nn.Module:
    """The projection in eval mode, its parameters and running statistics away from where they start."""
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    projection.train()(3.0 * torch.randn(64, FEATURES) + 1.0)
    return projection.eval()


def linear(bias: bool = False) -> nn.Linear:
    return nn.Linear(FEATURES, DIM, bias=bias)


class Adapted(nn.Module):
    """A low-rank adapter beside a layer, not merged."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = linear(), nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.base(rows) + self.up(self.down(rows))


class Frozen(nn.Module):
    """Batch norm with constants, such as torchvision's for feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([1.0, 2.0, -3.0, 0.5]))
        self.register_buffer("shift", torch.tensor([0.0, 1.0, 2.0, -5.0]))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.gain + self.shift


def pruned() -> nn.Linear:
    layer = linear()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


class Residual(nn.Sequential):
    """A sequence with a `forward` of its own."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + 3.0 * rows[:, :DIM]


class Flipped(nn.Identity):
    """Not what its base class is."""

    def forward(self, rows: Tensor) -> Tensor:
        return -rows[:, :DIM]


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * value


def changed(name: str, how: Callable[[nn.Module, str], object]) -> nn.Module:
    """Linear map with bias, and batch norm, of which one entry is changed."""
    projection = nn.Sequential(linear(bias=True), nn.BatchNorm1d(DIM))
    path, _, entry = name.rpartition(".")
    how(projection.get_submodule(path), entry)
    return projection


def hooked(kind: str) -> nn.Module:
    layer = linear()
    if kind == "forward":
        layer.register_forward_hook(lambda module, inputs, output: output.flip(1) + 1.0)
    elif kind == "pre":
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(1),))
    else:
        original = layer.forward
        layer.forward = lambda rows: original(rows).flip(1)
    return nn.Sequential(layer, nn.BatchNorm1d(DIM))


def double(layer: nn.Module, entry: str) -> None:
    parametrize.register_parametrization(layer, entry, Doubled())


def prune_half(layer: nn.Module, entry: str) -> None:
    prune.random_unstructured(layer, entry, amount=0.5)


#: Projections that can be read and written.
KNOWN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: build_projection("linear", FEATURES, DIM, seed=0),
    "linear+bn": lambda: build_projection("linear+bn", FEATURES, DIM, seed=0),
    "bias": lambda: linear(bias=True),
    "bias and batch norm": lambda: nn.Sequential(linear(bias=True), nn.BatchNorm1d(DIM)),
}
#: Projections that can be read only.
ASKED: dict[str, Callable[[], nn.Module]] = {
    "adapter": Adapted,
    "parametrisation": lambda: parametrizations.weight_norm(linear()),
    "pruned": pruned,
    "frozen batch norm": lambda: nn.Sequential(linear(), Frozen()),
    "batch norm without weight": lambda: nn.Sequential(linear(), nn.BatchNorm1d(DIM, affine=False)),
    "two batch norms": lambda: nn.Sequential(linear(), nn.BatchNorm1d(DIM), nn.BatchNorm1d(DIM)),
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm1d(FEATURES), linear()),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), linear()),
    "two layers": lambda: nn.Sequential(nn.Linear(FEATURES, 3), nn.Linear(3, DIM)),
    "batch norm without bias": lambda: changed("1.bias", lambda layer, entry: layer.register_parameter(entry, None)),
    "sequence in a sequence": lambda: nn.Sequential(nn.Sequential(linear(), nn.BatchNorm1d(DIM))),
    "sequence of its own": lambda: Residual(linear(), nn.BatchNorm1d(DIM)),
    "identity of its own": Flipped,
    "forward hook": lambda: hooked("forward"),
    "forward pre-hook": lambda: hooked("pre"),
    "forward of an instance": lambda: hooked("instance"),
    "bias parametrised": lambda: changed("0.bias", double),
    "bias pruned": lambda: changed("0.bias", prune_half),
    "gain parametrised": lambda: changed("1.weight", double),
    "gain pruned": lambda: changed("1.weight", prune_half),
    "shift parametrised": lambda: changed("1.bias", double),
    "shift pruned": lambda: changed("1.bias", prune_half),
    "older spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(linear()), nn.BatchNorm1d(DIM)),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
}
#: Projections that are not affine in eval mode.
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.Sequential(linear(), nn.LayerNorm(DIM)),
    "MLP": lambda: nn.Sequential(nn.Linear(FEATURES, 9), nn.ReLU(), nn.Linear(9, DIM)),
    "activation": lambda: nn.Sequential(linear(), nn.Tanh()),
    "batch norm without statistics": lambda: nn.Sequential(linear(), nn.BatchNorm1d(DIM, track_running_stats=False)),
}


@pytest.mark.parametrize("kind", [*KNOWN, *ASKED])
def test_what_is_read_is_what_forward_computes(kind):
    projection = with_statistics((KNOWN | ASKED)[kind]())
    matrix, shift = affine(projection, FEATURES)
    assert matrix.dtype == shift.dtype == torch.float64
    rows = 5.0 * torch.randn(33, FEATURES)
    torch.testing.assert_close((rows.double() @ matrix.T + shift).float(), projection(rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["adapter", "two layers"])
def test_a_projection_is_asked_in_its_own_dtype(kind, dtype):
    projection = with_statistics(ASKED[kind]()).to(dtype)
    matrix, shift = affine(projection, FEATURES)
    rows = torch.randn(33, FEATURES, dtype=dtype)
    found, expected = rows.double() @ matrix.T + shift, projection(rows).double()
    torch.testing.assert_close(found, expected, atol=100 * torch.finfo(dtype).eps, rtol=30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_affine_is_refused(kind):
    with pytest.raises(ArgumentError, match=r"computes A x \+ b"):
        affine(with_statistics(REFUSED[kind]()), FEATURES)


def test_reading_changes_neither_the_projection_nor_its_mode():
    projection = with_statistics(Adapted()).train()
    before = copy.deepcopy(projection.state_dict())
    affine(projection, FEATURES)
    assert all(module.training for module in projection.modules())
    assert all(torch.equal(value, before[name]) for name, value in projection.state_dict().items())


@pytest.mark.parametrize("kind", KNOWN)
@given(seed=st.integers(0, 2**16), magnitude=st.sampled_from([1e-6, 1.0, 1e6]), known=st.booleans())
def test_what_is_written_is_a_positive_multiple_of_what_is_read(kind, seed, magnitude, known):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    projection = KNOWN[kind]().eval()
    matrix, offset, centre = magnitude * draw(DIM, FEATURES), draw(DIM), draw(FEATURES)
    offset = magnitude * offset
    factor = draw(FEATURES, FEATURES)
    moments = {"mean": draw(FEATURES), "covariance": factor @ factor.T + torch.eye(FEATURES)} if known else {}
    set_affine_(projection, matrix, offset, centre=centre, **moments)
    read, shift = affine(projection, FEATURES)
    scale = float(read.norm() / matrix.norm())
    torch.testing.assert_close(read, scale * matrix, atol=1e-4 * float(read.norm()), rtol=1e-4)
    expected = scale * (offset - matrix @ centre) if kind != "linear" else torch.zeros(DIM).double()
    torch.testing.assert_close(shift, expected, atol=1e-4 * float(read.norm()), rtol=1e-4)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_weights_have_the_length_of_fresh_ones_and_gains_are_one_on_average(kind, magnitude):
    projection = KNOWN[kind]()
    matrix = magnitude * torch.randn(DIM, FEATURES).double()
    covariance = torch.diag(torch.rand(FEATURES).double() + 0.1)
    set_affine_(projection, matrix, matrix[:, 0], mean=torch.zeros(FEATURES).double(), covariance=covariance)
    layers = known_layers(projection)
    assert float(layers.linear.weight.detach().norm()) == pytest.approx((DIM / 3) ** 0.5, rel=1e-5)
    if layers.batch_norm is not None:
        assert float(layers.batch_norm.weight.detach().square().mean().sqrt()) == pytest.approx(1.0, rel=1e-4)


def test_train_mode_starts_from_the_same_function():
    rows = torch.randn(4096, FEATURES) @ torch.randn(FEATURES, FEATURES) + 2.0
    projection = KNOWN["linear+bn"]()
    mean, covariance = rows.double().mean(dim=0), torch.cov(rows.double().T, correction=0)
    set_affine_(
        projection, torch.randn(DIM, FEATURES).double(), torch.ones(DIM).double(), mean=mean, covariance=covariance
    )
    expected = projection.eval()(rows)
    torch.testing.assert_close(projection.train()(rows), expected, atol=1e-3, rtol=1e-3)


def test_statistics_are_those_of_the_rounded_weight():
    projection = nn.Sequential(linear().bfloat16(), nn.BatchNorm1d(DIM))
    matrix, mean = torch.randn(DIM, FEATURES).double(), 1000.0 * torch.ones(FEATURES).double()
    set_affine_(projection, matrix, torch.zeros(DIM).double(), mean=mean, covariance=torch.eye(FEATURES).double())
    weight = projection[0].weight.double()
    torch.testing.assert_close(projection[1].running_mean, (weight @ mean).float())
    torch.testing.assert_close(projection[1].running_var, weight.square().sum(dim=1).float())


@pytest.mark.parametrize("kind", [*ASKED, *REFUSED])
def test_what_cannot_be_written_is_refused_and_left_alone(kind):
    projection = (ASKED | REFUSED)[kind]()
    before = copy.deepcopy(projection.state_dict())
    with pytest.raises(ArgumentError, match="expected a projection that can be set"):
        set_affine_(projection, torch.ones(DIM, FEATURES).double(), torch.zeros(DIM).double())
    assert all(torch.equal(value, before[name]) for name, value in projection.state_dict().items())


def test_infinity_is_never_written():
    projection = KNOWN["linear+bn"]()
    covariance = 1e60 * torch.eye(FEATURES).double()
    with pytest.raises(ArgumentError, match="cannot hold"):
        affine_state(projection, torch.ones(DIM, FEATURES).double(), torch.zeros(DIM).double(), covariance=covariance)


def model_with(projection: nn.Module) -> nn.Module:
    model = convert_model(nn.Sequential(nn.Linear(FEATURES, 6)), dim=DIM, classifier="0")
    model[0].projection = projection
    return model


@pytest.mark.parametrize("kind", [*KNOWN, *ASKED])
def test_folding_keeps_the_ranking(kind):
    model = model_with(with_statistics((KNOWN | ASKED)[kind]())).eval()
    rows = torch.randn(200, FEATURES)
    before = model(rows).argmax(dim=1)
    assert torch.equal(to_linear(model)(rows).argmax(dim=1), before)


@pytest.mark.parametrize("kind", REFUSED)
def test_folding_refuses_and_leaves_the_model_as_it_was(kind):
    model = model_with(REFUSED[kind]())
    head = model[0]
    with pytest.raises(ArgumentError):
        to_linear(model)
    assert model[0] is head
    head.placement.check(head)


@pytest.mark.parametrize("kind", [*ASKED, *REFUSED])
def test_fits_and_warm_starts_refuse_before_anything_changes(kind):
    head = HypersphericalHead(FEATURES, 6, dim=DIM)
    head.projection = (ASKED | REFUSED)[kind]()
    before = copy.deepcopy(head.state_dict())
    seen = []
    loader = (seen.append(0) or (torch.randn(12, FEATURES), torch.arange(12) % 6) for _ in range(3))
    with pytest.raises(ArgumentError, match="can be set"):
        fit_head(head, loader)
    with pytest.raises(ArgumentError, match="can be set"):
        warm_start_(head, nn.Linear(FEATURES, 6))
    assert not seen, "the data were read before the projection was looked at"
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_a_weight_that_is_packed_into_other_tensors_is_read_and_not_written():
    packed, plain = linear(), linear()
    plain.load_state_dict(packed.state_dict())
    packed.weight.__tensor_flatten__ = lambda: (["values"], None)  # what quantised and sharded tensors have
    with pytest.raises(ArgumentError, match="a projection that can be set"):
        layers_of(packed)
    for read, expected in zip(affine(packed, FEATURES), affine(plain, FEATURES), strict=True):
        torch.testing.assert_close(read, expected, check_dtype=False)


def test_an_empty_sequence_is_no_projection_that_can_be_set():
    head = HypersphericalHead(DIM, 6, dim=DIM)
    head.projection = nn.Sequential()
    matrix, shift = affine(head.projection, DIM)
    assert torch.equal(matrix, torch.eye(DIM, dtype=torch.float64))
    assert not shift.any()
    with pytest.raises(ArgumentError, match="can be set"):
        warm_start_(head, nn.Linear(DIM, 6))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, lambda layer: prune_half(layer, "weight")], ids=["norm", "prune"]
)
def test_folding_right_after_loading_what_the_next_forward_pass_would_compute(change):
    models = [model_with(nn.Sequential(linear(), nn.BatchNorm1d(DIM))) for _ in range(2)]
    for model in models:
        change(model[0].projection[0])
    source, target = (with_statistics(model) for model in models)
    rows = torch.randn(200, FEATURES)
    target.load_state_dict(source.state_dict())
    assert torch.equal(to_linear(target)(rows).argmax(dim=1), source(rows).argmax(dim=1))


def test_describe_names_the_layers_of_another_projection():
    model = model_with(nn.Sequential(linear(), nn.LayerNorm(DIM)))
    assert "(Linear, LayerNorm)" in describe(model)
    model[0].projection = linear()
    assert "(linear)" in describe(model)


def test_fusing_the_batch_norm_keeps_the_logits():
    from torch.nn.utils.fusion import fuse_linear_bn_eval

    model = model_with(with_statistics(KNOWN["linear+bn"]())).eval()
    rows = torch.randn(16, FEATURES)
    before = model(rows)
    model[0].projection = fuse_linear_bn_eval(*model[0].projection)
    torch.testing.assert_close(model(rows), before, atol=1e-4, rtol=1e-4)
