"""The memory plan against what XLA compiles: bytes held and sent; alternatives fit; the rest is
refused.
"""

import dataclasses
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sicot_jax import config as config_lib
from sicot_jax.classifier.state import stream_weights
from sicot_jax.cli import main as cli
from sicot_jax.parallel import device_memory, mesh
from sicot_jax.training import device_batches
from sicot_jax.training.checkpoint import Checkpoints
from sicot_jax.training.memory import fit, plan
from sicot_jax.training.memory import report as plan_report
from sicot_jax.training.memory.fit import Alternative, find_alternatives
from sicot_jax.training.memory.plan import Collective, step_collectives
from sicot_jax.training.model import DataShape
from sicot_jax.training.setup import make_setup
from sicot_jax.training.state import abstract_state, initial_state
from sicot_jax.training.step import make_train_step

ROOT = Path(__file__).parents[3]
MESHES = [(8, 1), (4, 2), (2, 4)]
CLASSES, BATCH, WIDTH = 99_995, 64, 256
SHAPE = DataShape(CLASSES, 50, 16, 160_000)
SMALL = DataShape(11, 50, 16, 160)
KINDS = {
    "exact": [],
    "kept logits": ["--config.head.keep_logits=bfloat16"],
    "sampled": ["--config.head.kind=sampled", "--config.head.sample_rate=0.5"],
    "adamw": ["--config.optim.name=adamw"],
    "lars": ["--config.optim.name=lars"],
    "knn": ["--config.head.kind=knn"],
    "dense": ["--config.head.kind=dense"],
    "16 bits": ["--config.train.compute_dtype=bfloat16"],
    "float32 logits": ["--config.head.keep_logits=float32"],
    "one stream": ["--config.loss.mixed=0"],
    "frozen": ["--config.optim.trainable=visual"],
    "all neighbours": ["--config.head.sample_rate=1.0", "--config.head.neighbours=500"],
    "small chunks": ["--config.head.chunk=1000"],
    "codes": ["--config.loss.codes=1"],
    "box": ["--config.model.localization=features", "--config.loss.background_suppression=1"],
    "box and triplets": [
        "--config.model.localization=image",
        "--config.loss.background_suppression=1",
        "--config.loss.box_regression=1",
        "--config.loss.triplet=1",
    ],
    "largest entries": ["--config.train.gradient_ratio=0.01"],
}
SLOWER_HEADS = [
    "16 bits",
    "16 bits, adamw",
    "16 bits, sampled",
    "16 bits, knn",
    "16 bits, knn, all neighbours",
    "16 bits, frozen",
    "16 bits, frozen, kept logits",
    "16 bits, small chunks",
    "knn, all neighbours",
    "sampled, float32 logits",
    "sampled, one stream",
    "sampled, frozen",
    "dense, one stream",
    "dense, frozen",
    "small chunks, adamw",
]


# Of tests whose sums of bytes are of this network.
DEEPER = "--config.model.depth=18"


def wide(*overrides):
    """The tiny config with a head that outweighs its streams."""
    sizes = [f"--config.model.embedding_width={WIDTH}", f"--config.train.batch_size={BATCH}"]
    return config_lib.load_config("tiny", [*sizes, *overrides])


def quick(*overrides):
    """A step that compiles in seconds: the backbone only goes forward."""
    return config_lib.load_config(
        "tiny", ["--config.optim.trainable=(?!visual/resnet)", *overrides]
    )


def flags_of(kind: str) -> list[str]:
    return [option for name in kind.split(", ") for option in KINDS[name]]


def planned(config, shape=SHAPE, *, devices=8, activations=0, platform="gpu"):
    new = plan.make_memory_plan(config, shape, devices=devices, platform=platform)
    return dataclasses.replace(
        new,
        activations=activations,
        activations_photos=new.micro_batch_per_device,
        activations_backend="a test",
    )


def test_photos_on_the_devices_are_planned_for():
    """160,000 of 24x24x3 bytes, on every device."""
    apart = planned(wide())
    there = planned(
        wide(
            "--config.data.source=arrays",
            "--config.data.path=a.npz",
            "--config.data.on_device=true",
        )
    )
    assert there.total_bytes() - apart.total_bytes() == 160_000 * 24 * 24 * 3


def held(new, compiled) -> int:
    """What a device holds while a compiled step runs."""
    return fit.program_bytes(compiled) + sum(new.held_outside_step().values())


def compiled_head(config, device_mesh):
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, SHAPE, device_mesh)
        classifier = abstract_state(setup).classifier
        embedding = mesh.sharded_struct(
            jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32), device_mesh
        )
        label = mesh.sharded_struct(jax.ShapeDtypeStruct((BATCH,), jnp.int32), device_mesh)
        embeddings = {stream: embedding for stream in stream_weights(config.loss)}
        return (
            jax.jit(setup.head, donate_argnums=2)
            .lower(embeddings, label, classifier, setup.hyperparams())
            .compile()
        )


def collectives(compiled) -> dict[str, int]:
    """Bytes of the arrays that cross devices, by kind; of a reduce-scatter what goes in, of the
    others what comes out.
    """
    sizes: dict[str, int] = {}
    for line in compiled.as_text().splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)"
            r"(-start)?\(",
            line,
        )
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1)) if match else []:
            numbers = math.prod(int(n) for n in shape.split(",") if n)
            width = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4}[kind]
            devices = 8 if match.group(2) == "reduce-scatter" else 1
            sizes[match.group(2)] = sizes.get(match.group(2), 0) + numbers * width * devices
    return sizes


def bytes_by_kind(collectives_by_item, part: str) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for name, collective in collectives_by_item.items():
        if name.startswith(part):
            size = collective.size * collective.times
            sizes[collective.kind] = sizes.get(collective.kind, 0) + size
    return sizes


@pytest.mark.parametrize(("data", "model"), MESHES)
@pytest.mark.parametrize("options", ["exact", "adamw", "knn", "largest entries"])
def test_the_state_by_formula_is_what_the_compiled_program_takes(data, model, options):
    config = wide(*KINDS[options])
    device_mesh = mesh.make_mesh(data=data, model=model)
    with jax.set_mesh(device_mesh):
        state = abstract_state(make_setup(config, SHAPE, device_mesh))
        compiled = jax.jit(lambda state: state, donate_argnums=0).lower(state).compile()
    taken = compiled.memory_analysis().argument_size_in_bytes
    np.testing.assert_allclose(sum(planned(config).state_bytes().values()), taken, rtol=0.001)


@pytest.mark.parametrize(
    ("data", "model", "options"),
    [(*shape, "exact") for shape in MESHES]
    + [
        (8, 1, "kept logits"),
        (8, 1, "adamw"),
        (4, 2, "lars"),
        (4, 2, "sampled"),
        (2, 4, "knn"),
        (4, 2, "dense"),
    ]
    + [(8, 1, "16 bits, kept logits"), (2, 4, "one stream"), (4, 2, "frozen")]
    + [pytest.param(8, 1, options, marks=pytest.mark.slow) for options in SLOWER_HEADS],
)
def test_the_head_by_formula_is_what_the_compiled_head_takes_and_sends(data, model, options):
    config = wide(*flags_of(options))
    compiled = compiled_head(config, mesh.make_mesh(data=data, model=model))
    new = planned(config)
    np.testing.assert_allclose(
        new.head_bytes(), compiled.memory_analysis().temp_size_in_bytes, rtol=0.1
    )
    expected = bytes_by_kind(step_collectives(new), "classifier")
    if (
        "knn" in options
    ):  # a block is passed 7 times for each graph; on CPU with its 16-bit numbers widened
        expected["collective-permute"] *= (
            config.head.rebuild_steps / 7 * (2 if "16 bits" in options else 1)
        )
    compiled_sizes = {
        kind: size for kind, size in collectives(compiled).items() if size > 8
    }  # without two scalars: losses
    assert expected.keys() == compiled_sizes.keys()
    for kind, size in expected.items():
        np.testing.assert_allclose(size, compiled_sizes[kind], rtol=0.1, err_msg=kind)


@pytest.mark.parametrize(
    "options", ["knn", pytest.param("knn, all neighbours", marks=pytest.mark.slow)]
)
def test_the_graph_of_one_device_by_formula_is_what_the_compiled_head_takes(options):
    config = wide(*flags_of(options))
    compiled = compiled_head(config, mesh.make_mesh(devices=jax.devices()[:1]))
    taken = compiled.memory_analysis().temp_size_in_bytes
    np.testing.assert_allclose(planned(config, devices=1).head_bytes(), taken, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "micro_batches", "options"),
    [(*shape, parts, "exact") for shape in MESHES for parts in (1, 4)]
    + [
        (8, 1, 1, "largest entries"),
        (4, 2, 1, "codes"),
        (4, 2, 1, "box"),
        (4, 2, 1, "box and triplets"),
    ],
)
def test_the_step_by_formula_is_what_the_compiled_step_takes_and_sends(
    data, model, micro_batches, options
):
    config = wide(f"--config.train.micro_batches={micro_batches}", *flags_of(options))
    device_mesh = mesh.make_mesh(data=data, model=model)
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, SHAPE, device_mesh)
        compiled = fit.compile_step(setup, abstract_state(setup), BATCH)
    new = planned(config)
    size = compiled.memory_analysis()
    arguments = sum(new.state_bytes().values()) + new.batch_bytes()
    np.testing.assert_allclose(arguments, size.argument_size_in_bytes, rtol=0.01)
    # The program's text has the body of a loop once: the sums of one micro-batch stand there for
    # all.
    items = step_collectives(new)
    moments = items["streams: batch-norm statistics"]
    items["streams: batch-norm statistics"] = dataclasses.replace(
        moments, times=moments.times / micro_batches
    )
    if micro_batches > 1:  # the gather of one micro-batch in the loop, and of the last one after it
        gathered = items["classifier: embeddings"]
        items["classifier: embeddings"] = dataclasses.replace(gathered, times=2 / micro_batches)
    compiled_sizes = collectives(compiled)
    # A downsample's norm and the norm it is added to have equal gradients of their biases; XLA may
    # send them once.
    equal = 4 * sum((16, 32, 64))
    for kind in ("all-reduce", "all-gather"):
        np.testing.assert_allclose(
            bytes_by_kind(items, "")[kind],
            compiled_sizes[kind],
            rtol=0.01,
            atol=equal,
            err_msg=kind,
        )
    # One device's share, compiled alone, predicts the total: the backbone and nothing else is left
    # to it.
    total = fit.with_activations(new).total_bytes()
    np.testing.assert_allclose(total, held(new, compiled), rtol=0.1)


@pytest.mark.slow
def test_what_is_said_of_more_micro_batches_holds_once_they_are_compiled():
    config = config_lib.load_config(
        "tiny", [DEEPER, "--config.train.batch_size=2048", "--config.train.micro_batches=4"]
    )
    few = fit.with_activations(plan.make_memory_plan(config, SMALL, devices=1, platform="gpu"))
    memory = 27 * device_memory.MIB
    first = find_alternatives(few, memory)[0]
    assert str(first) == "--config.train.micro_batches=64"
    device_mesh = mesh.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        setup = make_setup(config_lib.override_config(config, first.overrides), SMALL, device_mesh)
        needed = held(first.plan, fit.compile_step(setup, abstract_state(setup), 2048))
    np.testing.assert_allclose(first.plan.total_bytes(), needed, rtol=0.1)
    assert needed <= plan.USABLE_SHARE * memory


def test_a_ring_sends_what_others_lack():
    assert Collective("all-gather", 800).bytes_sent(8) == 700
    assert Collective("reduce-scatter", 800).bytes_sent(8) == 700
    assert Collective("all-reduce", 800, 0.5).bytes_sent(8) == 700
    assert Collective("collective-permute", 800, 8 / 1000).bytes_sent(8) == 6.4
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute"):
        assert Collective(kind, 800).bytes_sent(1) == 0


@pytest.mark.parametrize("options", ["exact", "kept logits", "sampled", "knn"])
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_one_class_more_a_device_than_the_largest_number_does_not_fit(options, devices):
    new, memory = (
        planned(wide(*KINDS[options]), activations=100 * device_memory.MIB),
        4 * device_memory.GIB,
    )
    largest = plan.max_classes(new, memory, devices=devices)
    totals = [
        dataclasses.replace(
            new, devices=devices, shape=dataclasses.replace(SHAPE, num_classes=largest + more)
        ).total_bytes()
        for more in (0, 1, devices)
    ]
    assert totals[0] <= plan.USABLE_SHARE * memory < totals[1] == totals[2]
    assert plan.max_classes(new, device_memory.MIB, devices=devices) == 0


def test_there_are_no_more_classes_than_int32_counts():
    new = planned(wide("--config.model.embedding_width=1"))
    assert 2**31 - 65 < plan.max_classes(new, 2**60, devices=64) < 2**31


def test_only_what_shares_its_memory_with_the_host_holds_the_copy_of_a_checkpoint():
    new, there = planned(wide(), platform="cpu"), planned(wide())
    assert new.total_bytes() - there.total_bytes() == sum(new.state_bytes().values())
    lines = plan_report.device_kind_lines(new, None, "cpu")
    assert lines == plan_report.device_kind_lines(there, None, "cpu")
    for line in lines[2:]:
        assert line.split()[-2] == "-"  # 64 photos, but 16 of a batch of evaluation


def test_two_batches_are_on_a_device():
    new = planned(wide())
    assert (
        new.bytes_by_item()["batch"]
        == new.bytes_by_item()["batch: the next one"]
        == new.batch_bytes()
    )


def test_activations_follow_the_photos_at_a_time():
    config = wide("--config.train.micro_batches=2")
    new = planned(config, activations=8 * device_memory.MIB)
    assert new.photos_per_device == 8
    assert new.micro_batch_per_device == 4
    half = dataclasses.replace(
        new, config=config_lib.override_config(config, ["--config.train.micro_batches=4"])
    )
    more = dataclasses.replace(new, devices=16)
    for one in (half, more):
        assert one.bytes_by_item()["activations, compiled for a test"] == 4 * device_memory.MIB


def test_a_batch_that_grows_is_planned_for_its_largest():
    growing = ["--config.train.grow_every_epochs=1", "--config.train.max_micro_batches=4"]
    new, constant = planned(wide(*growing, "--config.train.epochs=3")), planned(wide())
    assert (new.batch_size, new.micro_batches) == (4 * BATCH, 4)
    assert new.micro_batch_per_device == constant.micro_batch_per_device
    assert new.batch_bytes() == 4 * constant.batch_bytes()
    for end in (
        "--config.train.epochs=2",
        "--config.train.steps=2501",
    ):  # twice as large from step 2500 on
        assert planned(wide(*growing, end)).batch_size == 2 * BATCH
    assert planned(wide(*growing, "--config.train.steps=2500")).micro_batches == 1


def test_what_does_not_train_has_no_gradient():
    new = planned(wide("--config.optim.trainable=classifier"))
    assert new.gradient == new.num_moments == 0
    assert new.parameters > 0


@pytest.mark.parametrize(
    ("options", "activations", "memory", "first"),
    [
        # activations alone are too many: fewer photos at a time
        ([], 1000, 500, "--config.train.micro_batches=4"),
        # the classifier alone is: a narrower one
        ([], 10, 42, "--config.model.embedding_width=128"),
        (["--config.head.keep_logits=float32"], 10, 62, "--config.head.keep_logits=no"),
        (["--config.head.kind=dense"], 10, 200, "--config.head.kind=class_sharded"),
        # both: no single change is enough
        ([], 1000, 170, "--config.model.embedding_width=128 --config.train.micro_batches=8"),
    ],
)
def test_what_would_fit_instead_does_by_the_same_formulas(options, activations, memory, first):
    config, memory = wide(DEEPER, *options), memory * device_memory.MIB
    new = planned(config, activations=activations * device_memory.MIB)
    assert not new.fits(memory)
    others = find_alternatives(new, memory)
    assert str(others[0]) == first
    for other in others:
        devices = other.plan.devices
        again = planned(config_lib.override_config(config, other.overrides), devices=devices)
        again = dataclasses.replace(
            again, activations=new.activations, activations_photos=new.activations_photos
        )
        assert again.total_bytes() == other.plan.total_bytes() <= plan.USABLE_SHARE * memory
        assert other.overrides or devices > 8


def test_more_cpu_devices_are_more_machines():
    new = planned(wide(), activations=device_memory.MIB)
    assert str(Alternative((), new)) == "8 devices of this kind"
    assert (
        str(Alternative((), dataclasses.replace(new, platform="cpu")))
        == "8 devices on machines like this one"
    )


def test_what_control_groups_leave_counts(tmp_path):
    root, groups = tmp_path / "cgroup", tmp_path / "self"
    (root / "job" / "task").mkdir(parents=True)
    (root / "memory" / "old").mkdir(parents=True)
    files = {
        "job/task/memory.max": "max",
        "job/memory.max": "700",
        "job/memory.current": "300",
        "job/memory.stat": "anon 200\ninactive_file 40\nactive_file 60",
        "memory.max": "900",
        "memory.current": "950",
        "memory.stat": "inactive_file 0",
        "memory/old/memory.limit_in_bytes": "800",
        "memory/old/memory.usage_in_bytes": "500",
        "memory/old/memory.stat": "inactive_file 1\ntotal_inactive_file 20",
    }
    for path, text in files.items():
        (root / path).write_text(f"{text}\n")
    groups.write_text("5:cpu,cpuacct:/old\n3:memory:/old\n0::/job/task\n")
    assert sorted(device_memory._left_in_control_groups(root, groups)) == [0, 320, 440, sys.maxsize]
    assert 0 < device_memory.available_host_memory() < 2**50


@pytest.mark.parametrize(
    (("name", "jax_names")),
    [
        ("TPU v5e", ["TPU v5 lite", "TPU v5e"]),
        ("TPU v5p", ["TPU v5", "TPU v5p"]),
        ("TPU v6e", ["TPU v6 lite", "TPU v6e"]),
        ("NVIDIA H100 80 GB", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"]),
        ("NVIDIA A100 80 GB", ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"]),
        ("NVIDIA L4", ["NVIDIA L4"]),
    ],
)
def test_a_kind_of_device_is_known_by_all_its_names(name, jax_names):
    assert [device_memory.find_device_kind(kind).name for kind in jax_names] == [name] * len(
        jax_names
    )
    assert device_memory.find_device_kind("NVIDIA L40S") is None


def test_devices_that_are_one_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(device_memory, "available_host_memory", lambda: 800)
    assert device_memory.memory_per_device(jax.devices()[:1]) == 800
    assert device_memory.memory_per_device(jax.devices()) == 100


def test_a_device_without_memory_for_the_state_is_refused_without_a_compiler(monkeypatch):
    config = wide(DEEPER, "--config.train.micro_batches=8")
    monkeypatch.setattr(fit, "memory_per_device", lambda devices: 20 * device_memory.MIB)
    monkeypatch.setattr(
        fit, "with_activations", lambda new: planned(config, activations=device_memory.MIB)
    )
    monkeypatch.delattr(fit, "compile_step")
    device_mesh = mesh.make_mesh()
    before = len(jax.live_arrays())
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, SHAPE, device_mesh)
        state = abstract_state(setup)
        with pytest.raises(fit.DoesNotFitError) as refused:
            fit.compile_within_memory(
                plan.make_memory_plan(config, SHAPE, devices=8, platform="gpu"),
                setup,
                state,
                [BATCH],
            )
    assert len(jax.live_arrays()) == before
    assert str(refused.value) == (
        "parameters, optimizer and what is held besides a step take 26.09 MiB, more than 95% of "
        "the 20.00 MiB that a device has; add --config.model.embedding_width=64"
    )
    lines = plan_report.alternative_lines(
        refused.value.plan, refused.value.alternatives, refused.value.memory
    )
    assert lines[0] == "what would fit instead:"
    assert "embedding_width=64" in lines[1]


def test_a_device_without_memory_for_the_compiled_step_is_refused(monkeypatch):
    config = wide()
    new = plan.make_memory_plan(config, SHAPE, devices=8, platform="cpu")
    kept, temporary = sum(new.state_bytes().values()), sum(new.temporary_bytes().values())
    size = types.SimpleNamespace(
        argument_size_in_bytes=kept + new.batch_bytes(),
        output_size_in_bytes=kept + 12,
        alias_size_in_bytes=kept,
        temp_size_in_bytes=temporary + 100 * device_memory.MIB,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: size)
    needed = new.total_bytes() + 12 + 100 * device_memory.MIB
    assert held(new, compiled) == needed
    monkeypatch.setattr(fit, "compile_step", lambda setup, state, batch_size: compiled)
    device_mesh = mesh.make_mesh()
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, SHAPE, device_mesh)
        target = abstract_state(setup)
        monkeypatch.setattr(
            fit, "memory_per_device", lambda devices: math.ceil(needed / plan.USABLE_SHARE)
        )
        assert fit.compile_within_memory(new, setup, target, [BATCH]) == {BATCH: compiled}
        monkeypatch.setattr(
            fit, "memory_per_device", lambda devices: None
        )  # not known: nothing to refuse by
        assert fit.compile_within_memory(new, setup, target, [BATCH]) == {BATCH: compiled}
        memory = math.floor((needed - 1) / plan.USABLE_SHARE)
        monkeypatch.setattr(fit, "memory_per_device", lambda devices: memory)
        with pytest.raises(fit.DoesNotFitError) as refused:
            fit.compile_within_memory(new, setup, target, [BATCH])
    assert str(refused.value) == (
        "a step and what is held besides it take "
        f"{device_memory.format_size(needed)}, more than 95% of the "
        f"{device_memory.format_size(memory)} that a device has; add "
        "--config.train.micro_batches=2"
    )
    assert (
        refused.value.plan.bytes_by_item()["activations, compiled for cpu"]
        == 100 * device_memory.MIB
    )


def test_a_device_without_memory_for_the_evaluation_is_refused(monkeypatch):
    config = quick("--config.eval.batch_size=64")
    device_mesh = mesh.make_mesh()
    with jax.set_mesh(device_mesh):
        setup = make_setup(config, SMALL, device_mesh)
        target = abstract_state(setup)
        taken = fit.evaluation_bytes(setup, target)
        assert (
            taken > 3 * 8 * 24 * 24 * 3
        )  # two batches of 8 photos a device and what their recognition holds
        new = plan.make_memory_plan(config, SMALL, devices=8, platform="gpu")
        needed = taken + sum(new.state_bytes().values()) + sum(new.held_outside_step().values())
        monkeypatch.setattr(
            fit, "memory_per_device", lambda devices: math.ceil(needed / plan.USABLE_SHARE)
        )
        assert fit.compile_within_memory(new, setup, target, []) == {}
        monkeypatch.setattr(fit, "evaluation_bytes", lambda setup, state: taken + 1)
        with pytest.raises(config_lib.ConfigError, match=r"lower eval.batch_size"):
            fit.compile_within_memory(new, setup, target, [])
        smaller = make_setup(quick("--config.eval.batch_size=32"), SMALL, device_mesh)
        fit.compile_within_memory(new, smaller, target, [])  # no more than training takes at a time


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), [(1, 1), (8, 1), (2, 4)])
def test_steps_compiled_ahead_run_on_started_returned_and_restored_states(data, model, tmp_path):
    """Shardings and weak types must be those of the shapes: what is compiled ahead takes nothing
    else.
    """
    config = quick("--config.train.grow_every_epochs=1", "--config.train.max_micro_batches=2")
    shape = SMALL
    device_mesh = mesh.make_mesh(data=data, model=model, devices=jax.devices()[: data * model])
    rng = np.random.default_rng(0)
    with jax.set_mesh(device_mesh):
        setup, new = (
            make_setup(config, shape, device_mesh),
            plan.make_memory_plan(config, shape, devices=device_mesh.size, platform="cpu"),
        )
        target = abstract_state(setup)
        steps = fit.compile_within_memory(new, setup, target, [32, 64])
        numbers = mesh.replicate_tree(setup.hyperparams(), device_mesh)
        state = initial_state(
            setup,
            mesh.shard_class_vector(
                np.zeros(target.classifier.weights.bias.shape, np.float32), device_mesh
            ),
        )
        checkpoints = Checkpoints(tmp_path, num_classes=11, writer=True)
        for batch_size in (32, 64):
            batch = {
                "image": rng.integers(0, 256, (batch_size, 24, 24, 3)).astype(np.uint8),
                "label": rng.integers(0, 11, batch_size).astype(np.int32),
                "token_ids": rng.integers(0, 50, (batch_size, 8)).astype(np.int32),
            }
            batch = device_batches.to_device(batch, device_mesh)
            state, _ = steps[batch_size](state, batch, numbers)
            checkpoints.save(state, int(state.step), info={})
            checkpoints.wait()
            _, losses = steps[batch_size](checkpoints.resume(target), batch, numbers)
            _, expected = jax.jit(make_train_step(setup))(
                checkpoints.resume(target), batch, numbers
            )
            assert losses["total"] == expected["total"]
        checkpoints.close()


def test_the_command_prints_the_plan_of_devices_that_are_not_here(capsys):
    arguments = [
        "plan",
        "--config=tiny",
        "--config.optim.trainable=classifier",
        "--config.data.generated.num_classes=20",
    ]
    assert cli.main([*arguments, "--devices=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 classes x 16 numbers, head class_sharded, on 16 devices"
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for part in (
        "classifier: embeddings",
        "memory a device, 2 of its 2 photos",
        "compiled for cpu",
        "fits: a cpu here has",
    ):
        assert part in text
    kinds = lines[
        lines.index(next(line for line in lines if line.startswith("largest number of classes")))
        + 2 :
    ]
    assert [line.split()[-2:] == ["at", "hand"] for line in kinds] == [True] + [False] * len(
        device_memory.DEVICE_KINDS
    )
    assert all(line.endswith("estimate") for line in kinds[1:])


def test_the_command_prints_what_would_fit(monkeypatch, capsys):
    monkeypatch.setattr(device_memory, "available_host_memory", lambda: 4 * device_memory.MIB)
    monkeypatch.setattr(
        fit,
        "with_activations",
        lambda new: planned(new.config, SMALL, devices=1, activations=8 * device_memory.MIB),
    )
    assert cli.main(["plan", "--config=tiny", "--devices=1"]) == 0
    out = capsys.readouterr().out
    assert "does not fit: a cpu here has 4.00 MiB" in out
    assert "  --config.train.micro_batches=" in out


@pytest.mark.parametrize(
    ("ratio", "devices", "says"),
    [
        (1, 8, ""),
        (0.1, 8, ""),
        (0.125, 8, "saves nothing on 8 devices: below 0.125"),
        (0.1, 1, "sends nothing"),
    ],
)
def test_a_ratio_that_saves_nothing_is_reported(ratio, devices, says):
    new = planned(wide(f"--config.train.gradient_ratio={ratio}"), devices=devices)
    assert says in "".join(plan_report.gradient_ratio_lines(new))
    assert bool(says) == bool(plan_report.gradient_ratio_lines(new))
    dense = planned(wide(), devices=devices)
    assert devices == 1 or (not says) == (ratio == 1 or of_streams(new) < of_streams(dense))


def of_streams(new: plan.MemoryPlan) -> float:
    """Bytes of gradients that a device sends."""
    return sum(
        collective.bytes_sent(new.devices)
        for name, collective in step_collectives(new).items()
        if name.startswith("streams")
    )


def test_a_run_that_does_not_fit_ends_with_its_plan_and_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device_memory, "available_host_memory", lambda: 8 * device_memory.MIB)
    monkeypatch.setattr(
        fit,
        "with_activations",
        lambda new: planned(new.config, SMALL, devices=8, activations=8 * device_memory.MIB),
    )
    before = len(jax.live_arrays())
    assert cli.main(["train", "--config=tiny", f"--workdir={tmp_path}"]) == cli.INPUT_ERROR
    assert len(jax.live_arrays()) == before
    *printed, last = capsys.readouterr().err.splitlines()
    assert "what would fit instead:" in printed
    assert any("activations, compiled for" in line for line in printed)
    assert re.fullmatch(
        r"sicot train: parameters, optimizer and .* of the 1.00 MiB that a device has; .*", last
    )
    assert not list((tmp_path / "checkpoints").glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=5"], "not divisible by 5 devices"),
        (["--devices=-1"], "wanted 1 or more"),
        (["--config.mesh.model=3"], "does not divide 8 devices"),
        (["--devices=16"], "leave some without a class"),
        (["--devices=8", "--config.mesh.model=3"], "--devices=8 is not a mesh of any x 3"),
        (["--devices=4", "--config.mesh.data=8"], "--devices=4 is not a mesh of 8 x 1"),
    ],
)
def test_devices_that_cannot_share_the_work_are_refused(capsys, arguments, message):
    assert cli.main(["plan", "--config=tiny", *arguments]) == cli.INPUT_ERROR
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_million_classes_are_planned_in_two_gib():
    program = """
import re, sys
from sicot_jax.cli.main import main
code = main(["plan", "--config=1m", "--devices=8"])
# Not getrusage: its peak begins with that of the process this one was started from.
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stderr.splitlines()[-1]) < 2 * 2**20  # KiB
    assert "998,131 classes x 2048 numbers, head class_sharded, on 8 devices" in done.stdout
    assert re.search(r"classifier: kernel, bias, prior +975\.69 MiB", done.stdout)
