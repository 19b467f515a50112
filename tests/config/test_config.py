"""Configs: three ways to load one, typed overrides, and a bad case for every check."""

import dataclasses
import json

import pytest
from helpers.damage import damaged_bytes, damaged_json, result_or_one_line
from hypothesis import example, given
from hypothesis import strategies as st

from sicot_jax import config as config_lib
from sicot_jax.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    bundled_configs_dir,
    config_from_dict,
    config_to_dict,
    flatten_config,
    load_config,
    override_config,
)
from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.errors import InputError

CUSTOM = Config(
    seed=7,
    data=DataConfig(source="arrays", path="a.npz", max_tokens=12),
    preprocessing=Preprocessing(
        height=10, width=12, resize_height=14, resize_width=15, fit="pad", mean=(0.1, 0.2, 0.3)
    ),
    model=ModelConfig(depth=18, text=TextConfig(encoder="lstm")),
    optim=OptimConfig(nesterov=True),
)


def test_bundled_configs_load_by_name_and_by_path():
    names = sorted(
        path.stem for path in bundled_configs_dir().glob("*.py") if path.stem != "__init__"
    )
    assert {"tiny", "generated"} <= set(names)
    for name in names:
        config = load_config(name)
        assert isinstance(config, Config)
        for other in (f"{name}.py", f"configs/{name}", str(bundled_configs_dir() / f"{name}.py")):
            assert load_config(other) == config


def test_a_path_comes_before_a_bundled_name(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(
        "from sicot_jax.config import Config\ndef get_config():\n    return Config(seed=99)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny.py").seed == 99
    assert load_config("tiny").seed == 0


def test_config_of_a_run_loads_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {"format": config_lib.CONFIG_FORMAT, "config": config_to_dict(CUSTOM), "data": {}}
        )
    )
    assert load_config(str(path)) == CUSTOM
    assert load_config(str(path), ["--config.seed=8"]) == dataclasses.replace(CUSTOM, seed=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 99, "config": {}}', r"format 99, this version reads 1"),
        ('{"format": 1, "config": {"sede": 1}}', r"unknown config key sede; did you mean seed\?"),
        ('{"format": 1}', r"no config in it; wanted the config.json of a run"),
        ("[]", r"no config in it; wanted the config.json of a run"),
        ('{"format": 1, "con', r"no JSON \(.*\); wanted the config.json of a run"),
    ],
)
def test_bad_config_json_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_unknown_name_lists_what_is_bundled(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"--config=tinny: no such file and no bundled config; bundled are .*generated.*tiny",
    ):
        load_config("tinny")
    other = tmp_path / "config.yaml"
    other.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"wanted a .py file or a run's config.json"):
        load_config(str(other))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return Config(preprocessing=Preprocessing(height=300))",
            r"^preprocessing: input 300x224 does not fit",
        ),
        (
            "return Config(seed=int('one'))",
            r"broken.py: ValueError: invalid literal .*; wanted Python with get_config",
        ),
    ],
)
def test_a_config_file_that_raises_is_one_line(tmp_path, body, message):
    imports = "from sicot_jax.config import Config, Preprocessing\n"
    (tmp_path / "broken.py").write_text(f"{imports}def get_config():\n    {body}\n")
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "broken.py"))


def test_dict_and_back():
    assert config_from_dict(config_to_dict(CUSTOM)) == CUSTOM
    assert (
        config_from_dict(json.loads(json.dumps(config_to_dict(CUSTOM)))) == CUSTOM
    )  # lists become tuples again
    assert config_from_dict({}) == Config()
    assert flatten_config({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--config.seed=5", "seed", 5),
        ("--config.train.steps=12", "train.steps", 12),
        ("--config.optim.learning_rate=0.5", "optim.learning_rate", 0.5),
        ("--config.optim.learning_rate=2", "optim.learning_rate", 2.0),
        ("--config.optim.weight_decay=1e-3", "optim.weight_decay", 1e-3),
        ("--config.model.text.encoder=dot", "model.text.encoder", "dot"),
        ("--config.optim.trainable=(?!visual/resnet)", "optim.trainable", "(?!visual/resnet)"),
        ("--config.data.path=a b=c", "data.path", "a b=c"),
        ("--config.data.path=", "data.path", ""),
        ("--config.augment.flip=false", "augment.flip", False),
        ("--config.optim.nesterov=true", "optim.nesterov", True),
        ("--config.preprocessing.mean=(0.5, 0.25, 1)", "preprocessing.mean", (0.5, 0.25, 1)),
        ("--config.data.generated.box_area=(0.2,0.4)", "data.generated.box_area", (0.2, 0.4)),
    ],
)
def test_override_sets_one_field_in_its_type(flag, name, value):
    config = Config()
    before = flatten_config(config_to_dict(config))
    changed = flatten_config(config_to_dict(override_config(config, [flag])))
    assert changed.pop(name) == value
    assert type(flatten_config(config_to_dict(override_config(config, [flag])))[name]) is type(
        before[name]
    )
    assert flatten_config(config_to_dict(config)) == before
    assert config == Config()
    before.pop(name)
    assert changed == before


def test_overrides_together_and_the_last_one_wins():
    config = load_config("tiny", ["--config.seed=1", "--config.train.steps=3", "--config.seed=2"])
    assert (config.seed, config.train.steps) == (2, 3)
    assert dataclasses.replace(
        config, seed=0, train=dataclasses.replace(config.train, steps=0)
    ) == load_config("tiny")
    assert override_config(CUSTOM, []) is CUSTOM


def test_overrides_are_checked_together():
    """Two fields that are wrong alone are right together."""
    flags = ["--config.train.batch_size=96", "--config.train.micro_batches=3"]
    assert override_config(Config(), flags).train.micro_batches == 3
    with pytest.raises(
        ConfigError, match=r"train.batch_size=256 is not divisible by train.micro_batches=3"
    ):
        override_config(Config(), flags[1:])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.optim.learning_rat=1",
            r"unknown option --config.optim.learning_rat=1; did you mean optim.learning_rate\?",
        ),
        ("--config.zzz=1", r"unknown option --config.zzz=1$"),
        ("--config.optim=1", r"unknown option --config.optim=1"),
        ("--config.seed", r"option --config.seed: wanted --config.seed=VALUE"),
        ("--config.seed=abc", r"--config.seed=abc: 'abc' is no int"),
        ("--config.train.steps=1.5", r"train.steps=1.5 is float, wanted int"),
        (
            "--config.optim.learning_rate=fast",
            r"--config.optim.learning_rate=fast: 'fast' is no float",
        ),
        ("--config.augment.flip=maybe", r"--config.augment.flip=maybe: 'maybe' is no bool"),
        ("--config.preprocessing.fit=zoom", r"preprocessing.fit='zoom', wanted one of"),
        (
            "--config.preprocessing.std=(1.0,2.0)",
            r"preprocessing.std=\(1.0, 2.0\), wanted 3 values",
        ),
    ],
)
def test_bad_override_is_named(flag, message):
    with pytest.raises(ConfigError, match=message):
        override_config(Config(), [flag])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"optim": {"momentun": 0.5}},
            r"unknown config key optim.momentun; did you mean momentum\?",
        ),
        ({"qqq": 1}, r"unknown config key qqq$"),
        ({"seed": "1"}, r"seed='1' is str, wanted int"),
        ({"seed": True}, r"seed=True is bool, wanted int"),
        ({"seed": 1.0}, r"seed=1.0 is float, wanted int"),
        ({"optim": {"learning_rate": True}}, r"optim.learning_rate=True is bool, wanted float"),
        ({"augment": {"flip": 1}}, r"augment.flip=1 is int, wanted bool"),
        (
            {"model": {"text": {"encoder": None}}},
            r"model.text.encoder=None is NoneType, wanted str",
        ),
        ({"preprocessing": {"mean": 0.5}}, r"preprocessing.mean=0.5 is float, wanted tuple"),
        ({"data": {"generated": 3}}, r"data.generated=3 is int, wanted a table of fields"),
        (
            {"preprocessing": {"height": 300}},
            r"input 300x224 does not fit into resized photo 256x256",
        ),
    ],
)
def test_bad_dict_is_named(tree, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"data": dict(on_device=True)},
            r"data.on_device with data.source='generated', .*export-arrays",
        ),
        (
            {"data": dict(source="array")},
            r"data.source='array', wanted one of .*; did you mean arrays\?",
        ),
        (
            {"data": dict(title="mask")},
            r"data.title='mask', wanted one of .*; did you mean masked\?",
        ),
        (
            {"train": dict(compute_dtype="float16")},
            r"train.compute_dtype='float16', wanted one of .*'bfloat16'",
        ),
        (
            {"data": dict(source="imported")},
            r"data.source='imported' needs data.path; add --config.data.path=PATH",
        ),
        ({"train": dict(batch_size=0)}, r"train.batch_size=0, wanted a positive number"),
        ({"train": dict(micro_batches=0)}, r"train.micro_batches=0, wanted a positive"),
        ({"train": dict(log_every_steps=0)}, r"train.log_every_steps=0, wanted a positive"),
        (
            {"train": dict(evaluate_every_epochs=0.0)},
            r"train.evaluate_every_epochs=0.0, wanted a positive",
        ),
        ({"eval": dict(batch_size=-1)}, r"eval.batch_size=-1, wanted a positive"),
        ({"eval": dict(top_k=0)}, r"eval.top_k=0, wanted a positive"),
        ({"eval": dict(class_chunk=0)}, r"eval.class_chunk=0, wanted a positive"),
        ({"data": dict(max_tokens=0)}, r"data.max_tokens=0, wanted a positive"),
        ({"optim": dict(learning_rate=0.0)}, r"optim.learning_rate=0.0, wanted a positive"),
        (
            {"optim": dict(learning_rate=float("nan"))},
            r"optim.learning_rate=nan, wanted a finite number",
        ),
        (
            {"train": dict(grow_every_epochs=float("inf"))},
            r"train.grow_every_epochs=inf, wanted a finite number",
        ),
        (
            {"optim": dict(schedule="steps")},
            r"optim.schedule='steps', wanted one of .*; did you mean step\?",
        ),
        (
            {"optim": dict(name="lamb")},
            r"optim.name='lamb', wanted one of \('sgd', 'lars', 'adamw'\)",
        ),
        ({"optim": dict(gamma=-2.0)}, r"optim.gamma=-2.0, wanted a positive"),
        ({"optim": dict(decay_epochs=-1.0)}, r"optim.decay_epochs=-1.0, wanted a positive"),
        ({"optim": dict(warmup_epochs=-3.0)}, r"optim.warmup_epochs=-3.0, wanted 0 or more"),
        (
            {"optim": dict(weight_decay=float("nan"))},
            r"optim.weight_decay=nan, wanted a finite number",
        ),
        ({"optim": dict(momentum=5.0)}, r"optim.momentum=5.0, wanted 0 up to"),
        (
            {"optim": dict(trust_coefficient=0.0)},
            r"optim.trust_coefficient=0.0, wanted a positive",
        ),
        (
            {"optim": dict(name="lars"), "head": dict(kind="sampled")},
            r"'sampled' with optim.name='lars': the norm of a kernel whose rows are not .* set "
            r"optim.name=sgd or head.kind",
        ),
        ({"model": dict(last_stride=0)}, r"model.last_stride=0, wanted 1 or 2"),
        ({"model": dict(embedding_width=-1)}, r"model.embedding_width=-1, wanted 0 or more"),
        ({"data": dict(workers=-1)}, r"data.workers=-1, wanted 0 or more"),
        ({"eval": dict(max_photos=-5)}, r"eval.max_photos=-5, wanted 0 or more"),
        (
            {"train": dict(checkpoint_every_steps=-1)},
            r"train.checkpoint_every_steps=-1, wanted 0 or more",
        ),
        (
            {"loss": dict(logit_adjustment=-1.0)},
            r"loss.logit_adjustment=-1.0, wanted 0 or more",
        ),
        ({"train": dict(epochs=0.0)}, r"steps or epochs=0.0, wanted a positive"),
        ({"train": dict(steps=-3)}, r"steps or epochs=-3, wanted a positive"),
        ({"seed": -1}, r"seed=-1, wanted 0 to 2\^32 - 1"),
        ({"seed": 2**32}, r"seed=4294967296, wanted 0 to"),
        ({"augment": dict(min_area=0.0)}, r"augment.min_area=0.0, wanted a share"),
        ({"augment": dict(min_area=1.5)}, r"augment.min_area=1.5, wanted a share"),
        ({"augment": dict(max_ratio=0.5)}, r"augment.max_ratio=0.5, wanted 1 or more"),
        (
            {"train": dict(batch_size=10, micro_batches=4)},
            r"train.batch_size=10 is not divisible by train.micro_batches=4",
        ),
        (
            {"train": dict(grow_every_epochs=-1.0)},
            r"train.grow_every_epochs=-1.0, wanted 0 or more",
        ),
        (
            {"train": dict(grow_every_epochs=2.0)},
            r"grow_every_epochs=2.0 with train.max_micro_batches=0: .* set both, or both to 0",
        ),
        (
            {"train": dict(max_micro_batches=8)},
            r"grow_every_epochs=0.0 with train.max_micro_batches=8: .* set both, or both to 0",
        ),
        *(
            (
                {"train": dict(micro_batches=4, grow_every_epochs=2.0, max_micro_batches=most)},
                rf"train.max_micro_batches={most}, wanted train.micro_batches=4 doubled once or "
                "more often",
            )
            for most in (2, 4, 6, 12)
        ),
        ({"loss": dict(visual=0.0, mixed=0.0)}, r"loss.visual and loss.mixed are both 0"),
        (
            {"loss": dict(visual=-1.0)},
            r"loss.visual=-1.0, wanted 0 or more",
        ),
        (
            {"loss": dict(code_balance=-1.0)},
            r"loss.code_balance=-1.0, wanted 0 or more",
        ),
        (
            {"model": dict(code_bits=100)},
            r"model.code_bits=100, wanted a multiple of 8 up to 4096",
        ),
        (
            {"loss": dict(codes_shape_embedding=True)},
            r"codes_shape_embedding=True with loss.codes=0: .* a weight",
        ),
        (
            {"loss": dict(codes=1.0), "train": dict(batch_size=8, micro_batches=8)},
            r"loss.codes=1.0 with one photo at a time .*: codes are learned from pairs; lower "
            r"train.micro_batches",
        ),
        *(
            (
                {"loss": dict(**{name: 1.0})},
                r"loss.background_suppression or loss.box_regression with "
                r"model.localization='none': .* set model.localization to",
            )
            for name in ("background_suppression", "box_regression")
        ),
        (
            {"model": dict(localization="both")},
            r"model.localization='both', wanted one of \('none', 'image', 'features'\)",
        ),
        (
            {
                "data": dict(source="arrays", path="a.npz", on_device=True),
                "model": dict(localization="image"),
                "loss": dict(box_regression=0.1),
            },
            r"loss.box_regression with data.on_device=True, .*; set data.on_device=False",
        ),
        (
            {"augment": dict(random_erasing=1.5)},
            r"augment.random_erasing=1.5, wanted a share from 0 to 1",
        ),
        ({"loss": dict(triplet=-1.0)}, r"loss.triplet=-1.0, wanted 0 or more"),
        (
            {"data": dict(title="none")},
            r"data.title='none' leaves nothing to read; set loss.mixed=0",
        ),
    ],
)
def test_every_check_names_field_and_suggestion(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_from_dict(settings)
    assert "\n" not in str(error.value)


def test_the_edges_of_the_checks_are_allowed():
    Config(
        seed=2**32 - 1,
        data=DataConfig(title="none", max_tokens=1),
        loss=LossConfig(mixed=0.0),
        augment=AugmentConfig(min_area=1.0, max_ratio=1.0),
        train=TrainConfig(batch_size=1, steps=1, epochs=0.0),
        eval=EvalConfig(batch_size=1, top_k=3, class_chunk=1),
    )


def test_batch_plan_of_a_config():
    """100 photos in batches of 10: doubled after 2 and 4 epochs, from one micro-batch to four."""
    plan = TrainConfig(batch_size=10, grow_every_epochs=2.0, max_micro_batches=4).batch_plan(100)
    assert [plan.size(step) for step in (0, 19, 20, 29, 30, 1000)] == [10, 10, 20, 20, 40, 40]
    assert TrainConfig(batch_size=10).batch_plan(100).doubled_at == ()


def test_what_decides_the_order_of_records_is_not_free():
    assert not {
        "train.batch_size",
        "train.micro_batches",
        "train.grow_every_epochs",
        "train.max_micro_batches",
    } & set(config_lib.FREE_ON_RESUME)


def test_free_fields_exist():
    assert set(config_lib.FREE_ON_RESUME) <= set(flatten_config(config_to_dict(Config())))


def test_with_text():
    assert LossConfig().with_text
    assert LossConfig(mixed=0.1).with_semantic
    words = LossConfig(mixed=0.0, tag_prediction=0.5)
    assert words.with_text
    assert not words.with_semantic
    assert not LossConfig(mixed=0.0).with_text


def test_a_batch_that_would_grow_before_its_first_step_is_refused():
    train = TrainConfig(batch_size=32, grow_every_epochs=0.1, max_micro_batches=2)
    with pytest.raises(
        ConfigError,
        match=r"grow_every_epochs=0.1 is 0.31 steps of 32 of 100 photos, wanted one or more",
    ):
        train.batch_plan(100)
    assert train.batch_plan(320).doubled_at == (1,)


# Values that each field may have whatever the others are.
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "data.title": st.sampled_from(("raw", "masked", "shuffled")),
        "data.max_tokens": st.integers(1, 1000),
        "data.sampling": st.sampled_from(("uniform", "class_balanced", "square_root")),
        "data.path": st.text(max_size=20),
        "data.triplets": st.text(max_size=20),
        "data.generated.seed": st.integers(0, 2**63 - 1),
        "data.generated.zipf_exponent": st.floats(0, 10, exclude_max=True),
        "data.generated.box_area": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 0.95)),
        "preprocessing.fit": st.sampled_from(("crop", "pad", "stretch")),
        "preprocessing.height": st.integers(1, 256),
        "preprocessing.resize_width": st.integers(224, 10_000),
        "preprocessing.mean": st.tuples(*[st.floats(-10, 10)] * 3),
        "augment.flip": st.booleans(),
        "augment.max_ratio": st.floats(1, 1e300),
        "model.depth": st.sampled_from((10, 18, 34, 50, 101, 152)),
        "model.text.encoder": st.sampled_from(("mean", "bilinear", "lstm")),
        "model.init_from": st.text(max_size=20),
        "loss.mixed": st.floats(0, 1e300),
        "loss.label_smoothing": st.floats(0, 1, exclude_max=True),
        "head.chunk": st.integers(1, 2**40),
        "optim.learning_rate": st.floats(0, 1e300, exclude_min=True),
        "optim.trainable": st.sampled_from(("", "classifier", "(?!visual/resnet)")),
        "train.batch_size": st.integers(6, 10_000),
        "train.epochs": st.floats(0, 1e6, exclude_min=True),
        "train.tensorboard": st.booleans(),
        "mesh.model": st.integers(1, 1024),
        "eval.top_k": st.integers(3, 1000),
    },
)


@given(OVERRIDES)
def test_any_config_is_the_same_after_json(overrides):
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    config = override_config(Config(), flags)
    flat = flatten_config(config_to_dict(config))
    assert {name: flat[name] for name in overrides} == overrides
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


STORED = {"format": config_lib.CONFIG_FORMAT, "config": config_to_dict(CUSTOM), "data": {}}


@given(damaged_json(STORED))
@example('{"format": 1, "config": {"a\\nb": 1}}')
@example('{"format": "a\\nb", "config": {}}')
@example(f'{{"format": 1, "config": {{"optim": {{"learning_rate": {10**400}}}}}}}')
@example("[" * 100_000)
def test_a_config_of_other_values_is_a_config_or_an_error_of_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    config = result_or_one_line(lambda: load_config(str(path)))
    if config is not None:
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@given(damaged_bytes(json.dumps(STORED).encode()) | st.binary(max_size=100))
def test_a_damaged_config_json_is_a_config_or_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    result_or_one_line(lambda: load_config(str(path)))


@given(st.sampled_from(sorted(flatten_config(STORED["config"]))), st.text(max_size=20))
@example("seed", "1" * 5000)
@example("seed", "[" * 1000)
@example("seed", "-" * 20_000)
@example("seed", "{[]: 1}")
@example("optim.trainable", "a{99999999999}")
@example("optim.learning_rate", "1" * 400)
@example("optim.trainable", "(" * 1000)
def test_any_text_is_a_value_or_an_error_of_one_line(name, text):
    result_or_one_line(lambda: override_config(CUSTOM, [f"--config.{name}={text}"]))
