"""Compares one step of the classifier with other ways to compute it.

A step is the loss, the gradient of the embeddings, and SGD with momentum.

Command:  python -m benchmarks.classifier_step
Smaller:  python -m benchmarks.classifier_step --sizes 128x512x16384 --rounds 1 --steps 2
GPU:      python -m benchmarks.classifier_step --sizes 512x2048x998131 --dtype bfloat16
Needs:    torch for its two contenders; otherwise jax, flax, optax and numpy.

A size is RxDxC: R embeddings (two streams of R / 2 photos) of width D, C classes. Every contender
runs in a new process, so that its peak memory is measured alone; a round runs all of them, and
medians are over the steps of all rounds.

`reference` is the three products (logits, gradient of the embeddings, gradient of the kernel) as
jitted matrix products, and one donated momentum update with that gradient, without a loss. It is
no lower bound, since chunks stay in cache. `sampled` takes the labels' classes and a tenth of the
others; so does Partial FC (An et al. 2021, after its public code: uniform scores, positives first,
gathered rows updated and written back), which is compared here without its margin.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from sicot_jax.classifier.class_weights import init_kernel
from sicot_jax.classifier.heads import make_head
from sicot_jax.classifier.knn_graph import knn_graph
from sicot_jax.classifier.lazy_update import make_lazy_update
from sicot_jax.classifier.state import init_classifier, make_hyperparams
from sicot_jax.config import HeadConfig, LossConfig, OptimConfig
from sicot_jax.parallel import mesh
from sicot_jax.training import optimizer as optim

LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


@dataclasses.dataclass(frozen=True)
class Size:
    """Embeddings, width and classes of a step."""

    rows: int
    width: int
    classes: int

    @classmethod
    def parse(cls, text: str) -> Size:
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.rows} x {self.width} x {self.classes:,}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of the three products of an exact step."""
        return 3 * 2 * self.rows * self.width * self.classes


def _seconds(function: Callable[[], object], times: int) -> list[float]:
    """Returns each call's wall time, after an uncounted one that compiles."""
    jax.block_until_ready(function())
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(function())
        durations.append(time.perf_counter() - start)
    return durations


def _random(size: Size):
    key = jax.random.key(0)
    embeddings = jax.random.normal(key, (size.rows, size.width))
    label = jax.random.randint(key, (size.rows // 2,), 0, size.classes, jnp.int32)
    return embeddings, label


def reference(size: Size, steps: int, dtype) -> dict:
    embeddings, _ = _random(size)
    embeddings = embeddings.astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (size.classes, size.width))
    momentum = jnp.zeros_like(kernel)
    product = jax.jit(
        lambda subscripts, a, b: jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32),
        static_argnums=0,
    )

    def update(kernel, momentum, gradient):
        momentum = MOMENTUM * momentum + gradient + DECAY * kernel
        return kernel - LR * momentum, momentum

    update = jax.jit(update, donate_argnums=(0, 1))
    narrow = kernel.astype(dtype)
    logits = product("rd,cd->rc", embeddings, narrow).astype(dtype)
    times = [
        _seconds(lambda: product("rd,cd->rc", embeddings, narrow), steps),
        _seconds(lambda: product("rc,cd->rd", logits, narrow), steps),
        _seconds(lambda: product("rc,rd->cd", logits, embeddings), steps),
    ]
    gradient = product("rc,rd->cd", logits, embeddings)
    state = [kernel, momentum]

    def step():
        state[:] = update(*state, gradient)
        return state

    times.append(_seconds(step, steps))
    square = jnp.ones((4096, 4096), dtype)
    rate = 2 * 4096**3 / min(_seconds(lambda: product("ij,jk->ik", square, square), 3))
    return {"seconds": [sum(parts) for parts in zip(*times, strict=True)], "square_rate": rate}


def dense_jax(size: Size, steps: int, dtype) -> dict:
    embeddings, label = _random(size)
    label = jnp.tile(label, 2)
    tx = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=MOMENTUM))

    def loss(embeddings, params):
        logits = jnp.einsum(
            "rd,cd->rc",
            embeddings.astype(dtype),
            params["kernel"].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        return 2 * jnp.mean(
            optax.losses.softmax_cross_entropy_with_integer_labels(logits + params["bias"], label)
        )

    def step(embeddings, params, opt_state):
        value, (cotangents, gradient) = jax.value_and_grad(loss, argnums=(0, 1))(embeddings, params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return value, cotangents, optax.apply_updates(params, updates), opt_state

    params = {
        "kernel": 0.01 * jax.random.normal(jax.random.key(1), (size.classes, size.width)),
        "bias": jnp.zeros(size.classes),
    }
    opt_state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(embeddings, params, opt_state).compile()
    state = [params, opt_state]
    del params, opt_state

    def run():
        value, cotangents, state[0], state[1] = compiled(embeddings, *state)
        return value, cotangents, state

    return {
        "seconds": _seconds(run, steps),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def sicot_head(config: HeadConfig):
    """Measures the training step's head, through its public signature."""

    def measure(size: Size, steps: int, dtype) -> dict:
        device_mesh = mesh.make_mesh()
        with jax.set_mesh(device_mesh):
            sgd, rate = (
                OptimConfig(momentum=MOMENTUM, weight_decay=DECAY),
                optax.constant_schedule(LR),
            )
            optimizer = optim.make_optimizer(sgd, rate)
            head = make_head(
                config,
                LossConfig(visual=1.0, mixed=1.0),
                num_classes=size.classes,
                optimizer=optimizer,
                lazy_update=make_lazy_update(sgd, rate),
                dtype=dtype,
            )
            padded = mesh.pad_classes(size.classes, device_mesh)
            prior = mesh.to_global({"p": np.zeros(padded, np.float32)}, device_mesh)["p"]
            state = [
                jax.jit(
                    lambda key, prior: init_classifier(
                        config,
                        key,
                        prior,
                        num_classes=size.classes,
                        width=size.width,
                        optimizer=optimizer,
                    )
                )(jax.random.key(1), prior)
            ]
            if (
                config.kind == "knn"
            ):  # any graph costs a step the same; building it has a separate table
                shape = state[0].sampling.neighbours.shape
                graph = np.random.default_rng(0).integers(0, size.classes, shape, dtype=np.int32)
                graph = mesh.to_global({"graph": graph}, device_mesh)["graph"]
                sampling = dataclasses.replace(
                    state[0].sampling, neighbours=graph, step=state[0].sampling.step + 1
                )
                state[0] = dataclasses.replace(state[0], sampling=sampling)
            embeddings, label = map(np.asarray, _random(size))
            batch = mesh.to_global(
                {"visual": embeddings[::2], "mixed": embeddings[1::2], "label": label}, device_mesh
            )
            label = batch.pop("label")
            hyperparams = make_hyperparams(LossConfig(visual=1.0, mixed=1.0), learning_rate=1.0)
            compiled = (
                jax.jit(head, donate_argnums=2).lower(batch, label, state[0], hyperparams).compile()
            )

            def run():
                losses, cotangents, state[0] = compiled(batch, label, state[0], hyperparams)
                return losses, cotangents, state

            return {
                "seconds": _seconds(run, steps),
                "temporary": compiled.memory_analysis().temp_size_in_bytes,
            }

    return measure


def graph_table(sizes: list[str], dtype) -> None:
    """Prints the time to build the graph of KNN softmax: exact, all pairs of classes."""
    rows = []
    device_mesh = mesh.make_mesh()
    for text in sizes:
        size = Size.parse(text)
        padded = mesh.pad_classes(size.classes, device_mesh)
        with jax.set_mesh(device_mesh):
            kernel = init_kernel(
                jax.random.key(0), padded, num_classes=size.classes, width=size.width, scale=1.0
            )
            k = HeadConfig().neighbours
            build = jax.jit(
                lambda w, n=size.classes, k=k: knn_graph(w, num_classes=n, k=k, dtype=dtype)
            )
            seconds = _seconds(lambda build=build, kernel=kernel: build(kernel), 1)[0]
        rows.append(
            (f"{size.classes:,} x {size.width}", f"{k}", f"{seconds:,.1f}", f"{seconds:,.1f}")
        )
    timing.print_table(
        "The graph of KNN softmax over all classes; rebuilt every 1,000 steps it adds a "
        "thousandth of that to a step.",
        ("classes x width", "neighbours", "seconds", "ms a step"),
        rows,
    )


def _torch_steps(size: Size, steps: int, step: Callable[[], None]) -> dict:
    import torch

    gpu = torch.cuda.is_available()
    taken = []
    for i in range(steps + 1):
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        taken += [time.perf_counter() - start] if i else []
    return {"seconds": taken, **({"peak": torch.cuda.max_memory_allocated()} if gpu else {})}


def _torch_start(size: Size, dtype):
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32
    embeddings = torch.randn(size.rows, size.width, device=device, requires_grad=True)
    label = torch.randint(size.classes, (size.rows // 2,), device=device).repeat(2)
    return device, narrow, embeddings, label


def plain_torch(size: Size, steps: int, dtype) -> dict:
    import torch

    device, narrow, embeddings, label = _torch_start(size, dtype)
    linear = torch.nn.Linear(size.width, size.classes, device=device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    def step():
        optimizer.zero_grad(set_to_none=True)
        embeddings.grad = None
        with torch.autocast(device, narrow, enabled=narrow != torch.float32):
            logits = linear(embeddings)
        (2 * torch.nn.functional.cross_entropy(logits.float(), label)).backward()
        optimizer.step()

    return _torch_steps(size, steps, step)


def partial_fc(rate: float):
    """Measures one rank of a class-parallel head; at rate 1 every class takes part."""

    def measure(size: Size, steps: int, dtype) -> dict:
        import torch

        device, narrow, embeddings, label = _torch_start(size, dtype)
        kernel = 0.01 * torch.randn(size.classes, size.width, device=device)
        momentum = torch.zeros_like(kernel)
        count = max(1, int(rate * size.classes))

        def step():
            embeddings.grad = None
            if rate < 1:
                with torch.no_grad():
                    positive = torch.unique(label)
                    score = torch.rand(size.classes, device=device)
                    score[positive] = 2.0
                    index = torch.topk(score, k=max(count, len(positive)))[1].sort()[0]
                    target = torch.searchsorted(index, label)
                rows, rows_momentum = kernel[index], momentum[index]
            else:
                rows, rows_momentum, target = kernel, momentum, label
            rows = rows.detach().requires_grad_()
            optimizer = torch.optim.SGD([rows], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
            optimizer.state[rows]["momentum_buffer"] = rows_momentum
            with torch.autocast(device, narrow, enabled=narrow != torch.float32):
                logits = torch.nn.functional.linear(embeddings, rows)
            # As its public code does: softmax and its gradient by hand, in place, so that no copy
            # of the logits is made.
            with torch.no_grad():
                probability = logits.float()
                probability -= probability.max(1, keepdim=True)[0]
                probability.exp_()
                probability /= probability.sum(1, keepdim=True)
                probability[torch.arange(len(label), device=device), target] -= 1
                probability /= len(label) / 2
            logits.backward(probability.to(logits.dtype))
            optimizer.step()
            if rate < 1:
                kernel[index], momentum[index] = (
                    rows.detach(),
                    optimizer.state[rows]["momentum_buffer"],
                )

        return _torch_steps(size, steps, step)

    return measure


CONTENDERS: dict[str, Callable[[Size, int, object], dict]] = {
    "reference": reference,
    "dense JAX (optax loss)": dense_jax,
    "plain PyTorch": plain_torch,
    "Partial FC, rate 1 (PyTorch)": partial_fc(1.0),
    "Partial FC, rate 0.1 (PyTorch)": partial_fc(0.1),
    "ours, exact": sicot_head(HeadConfig()),
    "ours, exact, bf16 logits kept": sicot_head(HeadConfig(keep_logits="bfloat16")),
    "ours, exact, f32 logits kept": sicot_head(HeadConfig(keep_logits="float32")),
    "ours, sampled, rate 0.1": sicot_head(HeadConfig(kind="sampled", sample_rate=0.1)),
    "ours, KNN, rate 0.1": sicot_head(HeadConfig(kind="knn", sample_rate=0.1)),
}


def _peak_bytes() -> int:
    """Returns this process's peak: of the accelerator where there is one, else resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def child(name: str, size: Size, steps: int, dtype) -> None:
    result = CONTENDERS[name](size, steps, dtype)
    print(json.dumps({"peak": _peak_bytes(), **result}))


def run_contender(name: str, size: str, args: argparse.Namespace) -> dict | None:
    command = [sys.executable, "-m", "benchmarks.classifier_step", "--child", name, "--sizes", size]
    command += ["--steps", str(args.steps), "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} at {size}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def table(size: str, args: argparse.Namespace) -> dict[str, float]:
    """Prints the table of a size and returns contender -> median seconds a step."""
    results: dict[str, list[dict | None]] = {name: [] for name in args.contenders}
    torch_missing = timing.missing_modules("torch")
    for _ in range(args.rounds):
        for name in args.contenders:
            if not ("PyTorch" in name and torch_missing):
                results[name].append(run_contender(name, size, args))
    parsed = Size.parse(size)
    bare = [r for r in results.get("reference", []) if r]
    base = statistics.median(s for r in bare for s in r["seconds"]) if bare else float("nan")
    rate = max((r["square_rate"] for r in bare), default=float("nan"))
    rows: list[tuple[str, ...]] = []
    medians: dict[str, float] = {}
    for name, measured in results.items():
        if not measured or None in measured:
            rows.append(
                (
                    name,
                    torch_missing
                    if "PyTorch" in name and torch_missing
                    else "it failed, see above",
                )
            )
            continue
        medians[name] = seconds = statistics.median(s for r in measured for s in r["seconds"])
        exact = "0.1" not in name
        temporary = f"{measured[0]['temporary'] / 2**20:,.0f}" if "temporary" in measured[0] else ""
        rows.append(
            (
                name,
                f"{1000 * seconds:,.0f}",
                f"{min(1000 * s for r in measured for s in r['seconds']):,.0f}",
                f"{seconds / base:.2f}",
                f"{100 * parsed.operations / seconds / rate:.0f} %" if exact else "",
                f"{max(r['peak'] for r in measured) / 2**30:.2f}",
                temporary,
            )
        )
    kernel = parsed.classes * parsed.width * 4 / 2**20
    timing.print_table(
        f"{parsed} (kernel {kernel:,.0f} MiB, momentum as much again); square product "
        f"{rate / 1e9:,.0f} GFLOP/s, {args.dtype}.",
        (
            "head",
            "ms a step",
            "best",
            "of reference",
            "of square rate",
            "peak GiB",
            "temporary MiB",
        ),
        rows,
    )
    return medians


def plot(seconds: dict[str, dict[str, float]], path: str) -> None:
    """Plots seconds a step over classes, a line for each contender."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    sizes = sorted(seconds, key=lambda size: Size.parse(size).classes)
    for name in seconds[sizes[0]]:
        points = [
            (Size.parse(size).classes, seconds[size][name])
            for size in sizes
            if name in seconds[size]
        ]
        style = "-" if name.startswith("ours") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name)
    first = Size.parse(sizes[0])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="classes",
        ylabel="seconds a step",
        title=f"{first.rows} embeddings of {first.width}",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        default=["128x512x16384", "128x512x262144", "128x128x1048576"],
        help="RxDxC; none: graphs alone",
    )
    parser.add_argument(
        "--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--graphs",
        nargs="*",
        default=["128x128x16384", "128x128x34258"],
        help="sizes of the graph table",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="PNG of the seconds over the classes, for sizes of one RxD"
    )
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, Size.parse(args.sizes[0]), args.steps, jnp.dtype(args.dtype))
        return
    if args.plot and not args.sizes:
        parser.error("--plot draws the tables of --sizes; name some")
    timing.print_machine(args.rounds)
    seconds = {size: table(size, args) for size in args.sizes}
    if args.plot:
        plot(seconds, args.plot)
    if args.graphs:
        graph_table(args.graphs, jnp.dtype(args.dtype))


if __name__ == "__main__":
    main()
