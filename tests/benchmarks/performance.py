"""Speed and memory beside peers, each pair measured in one run: prints the tables and writes docs/performance.md.

    python tests/benchmarks/performance.py                        # all of it: about half an hour on two idle cores
    python tests/benchmarks/performance.py --section dynamic      # measure one section again, keep the others
    python tests/benchmarks/performance.py --quick                # a smoke test: small sizes, no page written
    python tests/benchmarks/performance.py --device cuda          # the sections of a GPU, in a few minutes

Needs the `benchmarks` extra (pytorch-metric-learning, matplotlib). Ratios are what carries over to other machines.
"""

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Literal

import assignment
import scipy
import torch
from _measure import PeakMemory, in_new_process, time_alternately, time_calls
from torch import nn
from torch.nn.functional import cross_entropy

import hyperproto

HERE = Path(__file__)
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

from cuda_graph import captured  # noqa: E402
from published_banks import published_prototypes  # noqa: E402

BATCH, DIM = 256, 512

#: Up to so many classes nn.Linear and a head take turns in one process, and their ratio is of that.
LARGEST_ALTERNATING = 10_000


# The cases. Each runs in a process of its own and returns seconds and MiB.


def timed(step: Callable[[], object], repeats: int) -> dict[str, float]:
    # Around the first step already: what it leaves allocated, such as gradients, is part of the cost.
    with PeakMemory() as memory:
        seconds = time_calls(step, repeats=repeats, warm_up=2)
    return {"seconds": seconds, "mib": memory.mib}


def batch(num_classes: int, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, dim, generator=generator).requires_grad_()
    return features, torch.randint(num_classes, (BATCH,), generator=generator)


def linear_stepper(num_classes: int, dim: int) -> Callable[[], None]:
    features, labels = batch(num_classes, dim)
    layer = nn.Linear(dim, num_classes)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        cross_entropy(layer(features), labels).backward()

    return step


def linear_step(num_classes: int, repeats: int, dim: int = DIM) -> dict[str, float]:
    return timed(linear_stepper(num_classes, dim), repeats)


def arcface_step(num_classes: int, repeats: int, dim: int = DIM) -> dict[str, float]:
    from pytorch_metric_learning.losses import ArcFaceLoss

    features, labels = batch(num_classes, dim)
    loss = ArcFaceLoss(num_classes, dim)

    def step() -> None:
        loss.zero_grad(set_to_none=True)
        loss(features, labels).backward()

    return timed(step, repeats)


def build_head(
    num_classes: int, output: str, projection: str = "none", dim: int = DIM
) -> hyperproto.HypersphericalHead:
    bank = hyperproto.PrototypeBank(num_classes, dim, method="random")  # the method plays no part in a step's cost
    return hyperproto.HypersphericalHead(
        dim, num_classes, bank=bank, projection=projection, training_output=output, logit_scale=10.0
    )


def head_stepper(head: hyperproto.HypersphericalHead, dynamic: bool) -> Callable[[], None]:
    features, labels = batch(head.num_classes, head.dim)
    criterion = hyperproto.BalancedLoss(hyperproto.DynamicAssigner(head) if dynamic else head)

    def step() -> None:
        head.zero_grad(set_to_none=True)
        criterion(head(features), labels).backward()

    return step


def head_step(num_classes: int, repeats: int, output: str, dim: int = DIM) -> dict[str, float]:
    head = build_head(num_classes, output, dim=dim)
    trainable = sum(parameter.numel() * parameter.element_size() for parameter in head.parameters())
    step = head_stepper(head, dynamic=False)
    result = timed(step, repeats) | {"trainable_bytes": trainable}
    if num_classes <= LARGEST_ALTERNATING:
        result["linear"], result["seconds"] = time_alternately(linear_stepper(num_classes, dim), step, repeats=repeats)
    return result


def dynamic_step(num_classes: int, repeats: int, output: str, projection: str) -> dict[str, float]:
    steps = (head_stepper(build_head(num_classes, output, projection), dynamic) for dynamic in (False, True))
    static, dynamic = time_alternately(*steps, repeats=repeats)
    return {"static": static, "dynamic": dynamic}


def topk_evaluation(num_classes: int, chunked: bool) -> dict[str, float]:
    head = build_head(num_classes, "embedding").eval()
    features = batch(num_classes)[0].detach()
    with torch.no_grad():
        if chunked:
            return timed(lambda: head.topk(head.embed(features), 5), 3)
        return timed(lambda: head(features).topk(5, dim=1), 3)


def resnet_step(repeats: int) -> dict[str, float]:
    import timm

    model = hyperproto.convert_model(timm.create_model("resnet18", num_classes=1000), dim=DIM)
    criterion = hyperproto.BalancedLoss(model)
    images, labels = torch.randn(BATCH, 3, 64, 64), batch(1000)[1]
    return timed(lambda: criterion(model(images), labels).backward(), repeats)


def update_alone(num_classes: int, output: str, repeats: int) -> dict[str, float]:
    features, labels = batch(num_classes)
    head = build_head(num_classes, output)
    assigner = hyperproto.DynamicAssigner(head)
    returned = head(features).detach()
    return timed(lambda: assigner.update(returned, labels), repeats)


def bank(num_prototypes: int, dim: int, method: str) -> dict[str, float]:
    with PeakMemory() as memory:
        seconds = time_calls(lambda: hyperproto.PrototypeBank(num_prototypes, dim, method=method), repeats=1, warm_up=0)
    report = hyperproto.PrototypeBank(num_prototypes, dim, method=method).report()
    return {"seconds": seconds, "mib": memory.mib, "max_cosine": report.max_cosine, "bound": report.lower_bound}


def published_bank(num_prototypes: int, dim: int, objective: Literal["uniformity", "maxima"]) -> dict[str, float]:
    banks: list[torch.Tensor] = []

    def run() -> None:
        banks.append(published_prototypes(num_prototypes, dim, objective))

    with PeakMemory() as memory:
        seconds = time_calls(run, repeats=1, warm_up=0)
    report = hyperproto.PrototypeBank.from_tensor(banks[-1]).report()
    return {"seconds": seconds, "mib": memory.mib, "max_cosine": report.max_cosine, "bound": report.lower_bound}


CASES = {
    case.__name__: case
    for case in (
        linear_step,
        arcface_step,
        head_step,
        dynamic_step,
        topk_evaluation,
        resnet_step,
        update_alone,
        bank,
        published_bank,
    )
}


# The tables


def run(case: str, **arguments: object) -> dict[str, float]:
    result = in_new_process(str(HERE), case, **arguments)
    print(f"  {case} {arguments}: {result}", file=sys.stderr, flush=True)
    return result


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


#: Names in tables and pictures of the classifiers whose steps are compared.
LINEAR, ARCFACE = "nn.Linear + cross-entropy", "ArcFaceLoss (pytorch-metric-learning)"
LOGITS, EMBEDDINGS = "head, logits", "head, embeddings"


def measure_steps(num_classes: int, dim: int) -> dict[str, dict[str, float]]:
    repeats = 40 if num_classes <= 10_000 else 3
    size = {"num_classes": num_classes, "dim": dim}
    entries = {LINEAR: run("linear_step", repeats=repeats, **size)}
    if num_classes <= 100_000:
        entries[ARCFACE] = run("arcface_step", repeats=repeats, **size)
        entries[LOGITS] = run("head_step", repeats=repeats, output="logits", **size)
    return entries | {EMBEDDINGS: run("head_step", repeats=20, output="embedding", **size)}


def step_section(quick: bool) -> str:
    by_classes = {num: measure_steps(num, DIM) for num in (1_000, 10_000, *(() if quick else (100_000, 1_000_000)))}
    rows = []
    for num_classes, entries in by_classes.items():
        for name, entry in entries.items():
            speed = entry.get("linear", entries[LINEAR]["seconds"]) / entry["seconds"]
            rows.append(
                [
                    f"{num_classes:,}",
                    name,
                    f"{1e3 * entry['seconds']:.2f}",
                    f"{speed:.2f}x",
                    f"{entry['mib']:.0f}",
                    f"{entry['trainable_bytes']:.0f}" if "trainable_bytes" in entry else f"{4 * num_classes * DIM:,}",
                ]
            )
    header = ["C", "classifier and loss", "ms", "speed against nn.Linear", "peak MiB", "trainable bytes"]
    text = table(f"One training step, forward and backward (B = {BATCH}, D = {DIM})", header, rows)
    if not quick:
        by_dim = {dim: measure_steps(10_000, dim) for dim in (64, 128, 256, 512, 1024, 2048)}
        draw_growth(by_classes, by_dim, ROOT / "docs/images/growth.png")
    return text + "\n![Milliseconds of a training step against classes and dimension.](images/growth.png)\n"


def dynamic_section(quick: bool) -> str:
    rows = []
    repeats = 10 if quick else 100
    for output in ("logits", "embedding"):
        for projection in ("none", "auto"):
            entry = run("dynamic_step", num_classes=1000, repeats=repeats, output=output, projection=projection)
            rows.append(
                [
                    f"head, {output}, projection {projection}",
                    f"{1e3 * entry['static']:.2f}",
                    f"{1e3 * entry['dynamic']:.2f}",
                    f"{entry['dynamic'] / entry['static']:.2f}",
                ]
            )
    step = run("resnet_step", repeats=2 if quick else 5)
    for output in ("logits", "embedding"):
        update = run("update_alone", num_classes=1000, output=output, repeats=repeats)
        rows.append(
            [
                f"update alone in a resnet18 step at 64 px, {output}",
                f"{1e3 * step['seconds']:.1f}",
                f"{1e3 * (step['seconds'] + update['seconds']):.1f}",
                f"{1 + update['seconds'] / step['seconds']:.4f}",
            ]
        )
    header = ["step (C = 1,000)", "static, ms", "with assigner, ms", "ratio"]
    return table("What being dynamic costs", header, rows)


def evaluation_section(quick: bool) -> str:
    rows = []
    for num_classes in (10_000,) if quick else (100_000, 1_000_000):
        plain, chunked = (run("topk_evaluation", num_classes=num_classes, chunked=chunked) for chunked in (False, True))
        for name, entry in (("all logits, then topk", plain), ("head.topk", chunked)):
            rows.append([f"{num_classes:,}", name, f"{1e3 * entry['seconds']:.0f}", f"{entry['mib']:.0f}"])
    return table(f"Top 5 of a batch of {BATCH}", ["C", "way", "ms", "peak MiB"], rows)


def bank_section(quick: bool) -> str:
    rows = []
    for num, dim in ((100, 10),) if quick else ((100, 10), (100, 16), (100, 25), (100, 32), (200, 50), (1000, 128)):
        entries = {
            "separated": run("bank", num_prototypes=num, dim=dim, method="separated"),
            "SGD on uniformity, 1000 steps [1]": run(
                "published_bank", num_prototypes=num, dim=dim, objective="uniformity"
            ),
            "SGD on row maxima, 1000 steps [3]": run("published_bank", num_prototypes=num, dim=dim, objective="maxima"),
        }
        for name, entry in entries.items():
            rows.append(
                [
                    f"{num} x {dim}",
                    name,
                    f"{entry['max_cosine']:.4f}",
                    f"{entry['bound']:.4f}",
                    f"{entry['seconds']:.2f}",
                ]
            )
    text = table("Banks: largest cosine", ["C x D", "recipe", "largest cosine", "lower bound", "s"], rows)
    large = ((6_000, 64),) if quick else ((21_841, 512), (100_000, 512), (1_000_000, 512), (60_000, 256))
    rows = []
    for num, dim in large:
        entry = run("bank", num_prototypes=num, dim=dim, method="code")
        size = 4 * num * dim / 2**20
        rows.append(
            [
                f"{num:,} x {dim}",
                f"{entry['max_cosine']:.4f}",
                f"{entry['bound']:.4f}",
                f"{entry['seconds']:.1f}",
                f"{entry['mib']:.0f}",
                f"{size:.0f}",
            ]
        )
    header = ["C x D", "largest cosine", "lower bound", "s", "peak MiB", "the bank itself, MiB"]
    return text + "\n" + table('Banks for very many classes: method "code"', header, rows)


def assignment_section(quick: bool) -> str:
    rows = []
    for row in assignment.measure(quick):
        rows.append(assignment.cells(row))
        print(f"  {row}", file=sys.stderr, flush=True)
    text = table("The assignment step, exact, beside scipy.optimize.linear_sum_assignment", [*assignment.HEADING], rows)
    return (
        f"{text}\nMeans: random; nearly coinciding (an early epoch); in 20 tight clusters; each nearest its own "
        "prototype (trained). The ratio is scipy's seconds without those for its matrix over ours. "
        "Warm: from the prices of the step before, after small moves.\n"
    )


def draw_growth(
    by_classes: dict[int, dict[str, dict[str, float]]], by_dim: dict[int, dict[str, dict[str, float]]], path: Path
) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    labels = ("classes C (D = 512)", "dimension D (C = 10,000)")
    for axes, growth, label in zip(panels, (by_classes, by_dim), labels, strict=True):
        for name in (LINEAR, ARCFACE, LOGITS, EMBEDDINGS):
            points = [(size, 1e3 * entries[name]["seconds"]) for size, entries in growth.items() if name in entries]
            axes.loglog(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="ms per step")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"forward, loss and backward (B = {BATCH})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# On a GPU. All in one process: starting one takes longer than what is measured.

LOSSES = {
    "balanced": hyperproto.BalancedLoss,
    "long-tail": hyperproto.LongTailLoss,
    "cross-entropy": hyperproto.PrototypeCrossEntropyLoss,
}


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of a step among as many, by the device's own clock; the median of five rounds."""

    def round_of_steps() -> float:
        if device.type != "cuda":
            return 1e3 * time_calls(step, repeats=repeats, warm_up=0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    round_of_steps()
    return median(round_of_steps() for _ in range(5))


def graph_milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Of a step as a CUDA graph."""
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    return milliseconds(captured(step, stream), device, repeats=20)


def half_features(num_classes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backbone under autocast hands on, and labels."""
    features, labels = batch(num_classes)
    return features.detach().to(device, torch.bfloat16).requires_grad_(), labels.to(device)


def linear_graph(num_classes: int, device: torch.device) -> float:
    features, labels = half_features(num_classes, device)
    layer = nn.Linear(DIM, num_classes, device=device)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        features.grad = None
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            logits = layer(features)
        cross_entropy(logits.float(), labels).backward()

    return graph_milliseconds(step, device)


def head_graphs(num_classes: int, output: str, losses: tuple[str, ...], device: torch.device) -> Iterator[list[float]]:
    """Static and dynamic, for each loss."""
    features, labels = half_features(num_classes, device)
    head = build_head(num_classes, output, "auto").to(device)
    for loss in losses:
        taken = []
        for source in (head, hyperproto.DynamicAssigner(head)):
            criterion = LOSSES[loss](source)

            def step(criterion: nn.Module = criterion) -> None:
                head.zero_grad(set_to_none=True)
                features.grad = None
                with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                    returned = head(features)
                criterion(returned, labels).backward()

            taken.append(graph_milliseconds(step, device))
        yield taken


def cuda_step_section(quick: bool, device: torch.device) -> str:
    rows = []
    for num_classes in (1_000,) if quick else (1_000, 21_841, 100_000, 1_000_000):
        linear = linear_graph(num_classes, device)
        largest = num_classes == 1_000_000  # all cosines of a batch would take several GiB
        for output in ("embedding",) if largest else ("embedding", "logits"):
            losses = ("balanced",) if largest else ("balanced", "cross-entropy")
            for loss, taken in zip(losses, head_graphs(num_classes, output, losses, device), strict=True):
                ratios = [f"{each / linear:.2g}" for each in taken]
                rows.append([f"{num_classes:,}", f"{linear:.3f}", output, loss, *ratios])
                print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    header = ["C", "nn.Linear, ms", "output", "loss", "static", "dynamic"]
    title = f"On a GPU: a step of the head, nn.Linear + cross-entropy = 1 (B = {BATCH}, D = {DIM})"
    return table(title, header, rows) + (
        "\nForward, loss, update and backward as one CUDA graph, features in bf16, under autocast. The head has its "
        f"{DIM} x {DIM} projection and batch norm inside, nn.Linear has not.\n"
    )


def resnet50_step(classifier: tuple[str, str] | None, size: int, num_images: int, device: torch.device) -> float:
    """Of a whole training step in bf16: softmax, or a dynamic head with this output and loss."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=1000)
    criterion: nn.Module = nn.CrossEntropyLoss()
    if classifier is not None:
        output, loss = classifier
        hyperproto.convert_model(model, dim=DIM, training_output=output)
        criterion = LOSSES[loss](hyperproto.DynamicAssigner(model))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(num_images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (num_images,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            output = model(images)
        criterion(output.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return milliseconds(step, device, repeats=1 if device.type == "cpu" else 8)


def cuda_training_section(quick: bool, device: torch.device) -> str:
    torch.backends.cudnn.benchmark = True
    size, num_images = (64, 4) if quick else (224, BATCH)
    names = {"nn.Linear + cross-entropy": None} | {
        f"head, {output}, {loss}": (output, loss) for output in ("embedding", "logits") for loss in LOSSES
    }
    taken = {name: resnet50_step(classifier, size, num_images, device) for name, classifier in names.items()}
    linear = taken["nn.Linear + cross-entropy"]
    rows = [[name, f"{each:.1f}", f"{each / linear:.3f}"] for name, each in taken.items()]
    title = f"On a GPU: the whole training step of resnet50 at {size} px (batch {num_images}, C = 1,000, D = {DIM})"
    return table(title, ["classifier and loss", "ms", "ratio"], rows) + (
        "\nEager mode, bf16 by autocast, channels last, SGD; heads are dynamic: forward, loss, update, backward and "
        "optimiser.\n"
    )


SECTIONS = {
    "steps": step_section,
    "dynamic": dynamic_section,
    "assignment": assignment_section,
    "evaluation": evaluation_section,
    "banks": bank_section,
}
CUDA_SECTIONS = {"cuda-steps": cuda_step_section, "cuda-training": cuda_training_section}
PAGE = ROOT / "docs/performance.md"


def conditions(device: str) -> str:
    """Where and when a section was measured."""
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return (
        f"*Measured on {date.today()}: hyperproto {hyperproto.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, scipy {scipy.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, {card}.*"
    )


def write_page(sections: dict[str, str]) -> None:
    """The page with new texts for some sections and the old ones for the others."""
    old = PAGE.read_text() if PAGE.exists() else ""
    for name in (*SECTIONS, *CUDA_SECTIONS):
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", old, flags=re.DOTALL)
        if found:
            sections.setdefault(name, found[1])
    head = (
        "# Performance\n\nMade by `python tests/benchmarks/performance.py`. Each row is a process of its own; seconds "
        "are medians, memory is the peak above what the process held before. Up to 10,000 classes, heads take turns "
        "with nn.Linear, and dynamic heads with static ones. Ratios are what carries over to other machines.\n\n"
    )
    written = [
        f"<!-- {name} -->\n{sections[name]}<!-- end -->\n" for name in (*SECTIONS, *CUDA_SECTIONS) if name in sections
    ]
    PAGE.write_text(head + "\n".join(written) + '\n## Sources\n\n--8<-- "README.md:sources"\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, no page written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the sections that are measured")
    parser.add_argument("--section", choices=(*SECTIONS, *CUDA_SECTIONS), help="only this one")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(CASES[arguments.case](**arguments.arguments)))
        return
    on_gpu = arguments.device == "cuda"
    sections = CUDA_SECTIONS if on_gpu else SECTIONS
    if arguments.section not in (None, *sections):
        parser.error(f"{arguments.section} is no section of --device {arguments.device}: {', '.join(sections)}.")
    for name in [arguments.section] if arguments.section else sections:
        more = (torch.device("cuda"),) if on_gpu else ()
        measured = sections[name](arguments.quick, *more)
        text = f"{measured}\n{conditions(arguments.device)}\n"
        print(text, flush=True)
        if not arguments.quick:
            write_page({name: text})


if __name__ == "__main__":
    main()
