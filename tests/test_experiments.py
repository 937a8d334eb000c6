"""experiments/: runs that are listed can be made, results belong to them, and the page shows what they say."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hyperproto

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import cifar100  # noqa: E402
import finetune  # noqa: E402
import penalised  # noqa: E402
import published_banks  # noqa: E402
import rematching  # noqa: E402
import scale  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402

SUITES = pytest.mark.parametrize("suite", cifar100.METHODS)
#: "published" takes a GPU, or days; it is listed for those who have one.
MEASURED = pytest.mark.parametrize("suite", [suite for suite in cifar100.METHODS if suite != "published"])


@SUITES
def test_runs_differ_from_each_other_and_give_every_method_every_seed(suite):
    runs = [(method, cifar100.arguments_of(flags)) for method, flags in cifar100.runs(suite)]
    assert all(runs.count(run) == 1 for run in runs)
    for method in cifar100.METHODS[suite]:
        seeds = [arguments["seed"] for name, arguments in runs if name == method]
        assert set(seeds) == set(cifar100.SEEDS[suite])
        assert len(seeds) % len(cifar100.SEEDS[suite]) == 0


@SUITES
def test_every_run_can_take_its_epochs_from_another_one(suite):
    for _, flags in cifar100.runs(suite):
        assert train.parse_arguments(["DATA", *flags, "--epochs-from", "epoch.pt"]).epochs_from == Path("epoch.pt")


@pytest.mark.parametrize(
    ("suite", "method", "place", "trained"),
    [
        ("banks", "hpn", "balanced", "simplex, refitted"),
        ("variants", "softmax, refitted, learning rate 0.4", "variants", "softmax, learning rate 0.4"),
    ],
)
def test_epochs_come_from_a_run_that_trained_the_same(suite, method, place, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "HERE", tmp_path)
    flags = next(flags for name, flags in cifar100.runs(suite) if name == method)
    others = next(flags for name, flags in cifar100.runs(place) if name == trained)
    assert cifar100.trained_epochs(suite, flags) is None
    folder = cifar100.output_of(place, others)
    folder.mkdir(parents=True)
    (folder / "epoch10.pt").touch()
    assert cifar100.trained_epochs(suite, flags) == folder / "epoch10.pt"


@MEASURED
def test_every_result_is_that_of_one_run(suite):
    listed = [cifar100.arguments_of(flags) for _, flags in cifar100.runs(suite)]
    found = [cifar100.deciding(result["arguments"]) for result in cifar100.results_of(suite)]
    assert found
    assert all(arguments in listed for arguments in found)
    assert all(found.count(arguments) == 1 for arguments in found)


@pytest.mark.parametrize("objective", ["uniformity", "maxima"])
def test_published_banks_stop_on_their_way_to_the_minimum(objective):
    def value(rows: np.ndarray) -> float:
        cosines = rows @ rows.T
        if objective == "maxima":
            return float((cosines - 2 * np.eye(len(rows))).max(axis=1).mean())
        squared_distances = np.square(rows[:, None] - rows[None]).sum(axis=2)
        return float(np.log(np.exp(-2 * squared_distances)[~np.eye(len(rows), dtype=bool)].mean()))

    first, last = (
        published_banks.published_prototypes(100, 10, objective, steps=steps).double().numpy() for steps in (0, 1000)
    )
    np.testing.assert_allclose(np.linalg.norm(last, axis=1), 1.0, atol=1e-6)
    method = {"uniformity": "uniform", "maxima": "hpn"}[objective]
    minimum = hyperproto.PrototypeBank(100, 10, method=method).prototypes.double().numpy()
    assert value(minimum) < value(last) < value(first)


def test_published_banks_are_files_that_the_runs_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "HERE", tmp_path)
    cifar100.save_published_banks()
    wanted = {flag for _, flags in cifar100.runs("banks") for flag in flags if flag.endswith(".npy")}
    shapes = {path.name: np.load(path).shape for path in (tmp_path / "output").iterdir()}
    assert shapes == {name: (100, int(name.removesuffix(".npy").split("-")[-1])) for name in wanted}


def test_the_pages_show_what_the_results_say(tmp_path, monkeypatch):
    pages = {name: getattr(tables, name).read_text() for name in ("PAGE", "PRETRAINED", "SCRATCH", "README", "SCALES")}
    for name, page in pages.items():
        emptied = tmp_path / name
        lines = page.splitlines(keepends=True)
        emptied.write_text("".join(line for line in lines if "±" not in line and not line.startswith("| D |")))
        monkeypatch.setattr(tables, name, emptied)
    tables.main()
    assert {name: getattr(tables, name).read_text() for name in pages} == pages
    assert "±" in pages["README"]


def test_mean_and_deviation_by_hand():
    lines = [{"top1": 1.0, "tail_accuracy": None}, {"top1": 3.0, "tail_accuracy": 2.0}]
    assert tables.shown(lines, "top1") == "2.0 ± 1.4"
    assert tables.shown(lines[:1], "top1") == "1.0"
    assert tables.shown(lines, "tail_accuracy") == "-"


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("scale", [*scale.runs("scratch"), *scale.runs("frozen")]),
        ("rematching", [*rematching.runs("scratch"), *rematching.runs("frozen")]),
    ],
    ids=["scale", "rematching"],
)
def test_every_line_is_that_of_one_run(name, listed):
    found = [{key: line[key] for key in listed[0]} for line in cifar100.results_of(name)]
    assert found
    assert all(run in listed for run in found)
    assert all(group.count(run) == 1 for group in (listed, found) for run in group)


def test_fine_tuning_climbs_to_the_rate_that_the_images_beside_choose():
    cells = [cell for group in finetune.cells() for cell in group]
    best = {cell: 1e-3 * 2.0 ** (number % 4 - 1) for number, cell in enumerate(cells)}
    lines = []
    for run in finetune.runs(lines):
        lines.append({**run, "judged_top1": -abs(math.log(run["rate"] / best[run["method"], run["dim"]]))})
    chosen = finetune.chosen(lines)
    for cell, rate in best.items():
        assert [(line["seed"], line["rate"]) for line in chosen[cell]] == [(0, rate), (1, rate), (2, rate)]
        tried = {line["rate"] for line in lines if (line["method"], line["dim"]) == cell}
        assert {rate / 2, rate, 2 * rate} <= tried
    assert not list(finetune.runs(lines))


def test_every_line_of_fine_tuning_is_one_that_was_asked_for():
    lines = cifar100.results_of("finetune")
    assert lines
    known = []
    for line in lines:  # in their order, and the others in any
        cell = line["method"], line["dim"]
        assert cell in {cell for group in finetune.cells() for cell in group}
        assert finetune.missing_rate(cell, line["seed"], known) == line["rate"]
        known.append(line)


def test_a_difference_and_its_error_by_hand():
    first, second = ({"correct": np.packbits(bits).tobytes().hex()} for bits in ([1, 1, 0, 0] * 2, [1, 1, 1, 0] * 2))
    # One image in four more is right: 25 %, with a deviation of sqrt(0.25 * 0.75) over 8 images.
    assert tables.difference([(first, second)]) == "+25.0 ± 15.3"
    assert tables.difference([(first, second), (second, first)]) == "+0.0 ± 0.0"
    assert tables.difference([]) == "-"


def clouds(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(num, 6) around four corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 4
    return 2.0 + 3.0 * (torch.eye(4, 6)[labels] + 0.4 * torch.randn(num, 6, generator=generator)), labels


@pytest.mark.parametrize("dim", [None, 2])
def test_a_penalised_softmax_is_at_a_stationary_point_of_its_loss(dim):
    samples = {"fit": clouds(200, 0), "held_out": clouds(100, 1)}
    probe = penalised.fit_probe(samples, dim=dim, iterations=1000)
    rows, labels = (tensor.double().numpy() for tensor in samples["fit"])
    deviation = np.sqrt(rows.var(axis=0, ddof=1).mean())
    standard = (rows - rows.mean(axis=0)) / deviation
    probabilities = probe(samples["fit"][0]).double().softmax(dim=1).numpy()
    slope = (probabilities - np.eye(4)[labels.astype(int)]).T @ standard / len(rows)  # (C, F), by the logits' matrix
    second = probe.second.double().numpy()
    if dim is None:
        slopes = [slope + probe.penalty * second * deviation]
    else:
        first = probe.first.double().numpy() * deviation
        slopes = [slope @ first.T + probe.penalty * second, second.T @ slope + probe.penalty * first]
    assert max(abs(part).max() for part in slopes) < 2e-3 * abs(slope).max() + 1e-4


def test_two_factors_are_the_probe_that_they_start_from():
    probe = penalised.fit_probe({"fit": clouds(80, 0), "held_out": clouds(40, 1)}, dim=2)
    rows = clouds(10, 2)[0]
    torch.testing.assert_close(finetune.TwoFactors(probe)(rows), probe(rows), atol=1e-4, rtol=1e-4)


def test_a_learned_scale_is_that_of_the_cross_entropy():
    head = hyperproto.HypersphericalHead(6, 4, dim=3)
    criterion = scale.LearnedScale(hyperproto.DynamicAssigner(head))
    rows, labels = clouds(20, 0)
    logits = head(rows)
    assert criterion.scale == pytest.approx(float(head.logit_scale))
    torch.testing.assert_close(criterion(logits, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_rotated_prototypes_go_where_the_class_means_are():
    head = hyperproto.HypersphericalHead(6, 8, dim=3)
    assigner, turned = rematching.Rotation(head), head.bank.prototypes @ torch.linalg.qr(torch.randn(3, 3)).Q
    assigner.update(turned, torch.arange(8))
    assigner.step()
    between = turned @ turned.T
    torch.testing.assert_close(head.bank.prototypes @ head.bank.prototypes.T, between, atol=1e-5, rtol=0.0)
    assert float((head.class_prototypes * turned).sum()) > float((head.class_prototypes @ turned.T).mean()) + 4.0


def test_class_means_become_the_prototypes():
    head = hyperproto.HypersphericalHead(6, 8, dim=3)
    assigner, means = rematching.ClassMeans(head), torch.nn.functional.normalize(torch.randn(8, 3))
    assigner.update(means, torch.arange(8))
    assigner.step()
    torch.testing.assert_close(head.class_prototypes, means)
