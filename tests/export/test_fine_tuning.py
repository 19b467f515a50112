"""One step of fine-tuning in JAX and in PyTorch from the same weights gives the same loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sicot_jax.config.preprocessing import Preprocessing
from sicot_jax.weights.bundle import RecognizerSpec
from sicot_jax.weights.visual import (
    init_visual_stream,
    torch_template,
    visual_from_torch,
    visual_to_torch,
)

torch = pytest.importorskip("torch", reason="conversion needs the extra torch")
RATE, MOMENTUM = 0.003, 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(18, 0), (18, 12), (50, 0)])
def test_the_loss_after_a_step_equals_pytorch_s(depth, width):
    """SGD with momentum on mean cross entropy; width of the projection, 0 for none. Torch's running
    variances are converted to biased ones first.
    """
    model = RecognizerSpec(
        depth, 8, "imagenet", last_stride=2, embedding_width=width, num_classes=5
    )
    torch.manual_seed(depth)
    rng = np.random.default_rng(depth)
    images = rng.normal(size=(16, 96, 64, 3)).astype(np.float32)
    labels = rng.integers(0, model.num_classes, len(images))
    batch, target = torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels)
    recognizer = torch_template().SicotRecognizer(
        dataclasses.asdict(model), dataclasses.asdict(Preprocessing()), [""] * model.num_classes
    )
    with torch.no_grad():
        for name, scale in recognizer.named_parameters():
            if name.endswith("bn3.weight" if depth >= 50 else "bn2.weight"):
                # With 1 a deep random network enlarges rounding from block to block: torch's
                # gradients in float32 and float64 are then several per cent apart.
                scale.fill_(0.2)
    norms = {
        name: m
        for name, m in recognizer.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    }
    counts = statistics_of(batch, recognizer, norms)

    arrays = {name: tensor.clone().numpy() for name, tensor in recognizer.state_dict().items()}
    fc = {"kernel": jnp.asarray(arrays["fc.weight"]), "bias": jnp.asarray(arrays["fc.bias"])}
    graphdef, *trees = nnx.split(init_visual_stream(model), nnx.Param, nnx.BatchStat)
    params, stats = (visual_from_torch(nnx.to_pure_dict(tree), arrays) for tree in trees)

    def loss_jax(trained, stats, train):
        stream = nnx.merge(graphdef, trained["visual"], stats, copy=True)
        logits = (
            stream.embed(jnp.asarray(images), train=train) @ trained["fc"]["kernel"].T
            + trained["fc"]["bias"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.to_pure_dict(nnx.state(stream, nnx.BatchStat))

    @jax.jit
    def step_jax(trained, stats):
        (loss, stats), gradient = jax.value_and_grad(loss_jax, has_aux=True)(trained, stats, True)
        optimizer = optax.sgd(RATE, MOMENTUM)
        updates, _ = optimizer.update(gradient, optimizer.init(trained))
        return loss, optax.apply_updates(trained, updates), stats

    optimizer = torch.optim.SGD(recognizer.parameters(), RATE, momentum=MOMENTUM)

    def loss_torch():
        return torch.nn.functional.cross_entropy(recognizer(batch), target)

    first = loss_torch()
    first.backward()
    optimizer.step()
    with jax.default_matmul_precision("highest"):
        before, trained, moved = step_jax({"visual": params, "fc": fc}, stats)
        after = [float(loss_jax(trained, moved, train)[0]) for train in (True, False)]
    np.testing.assert_allclose(
        before, first.item(), rtol=1e-4
    )  # batch norms over 48 values enlarge rounding

    for name, norm in norms.items():
        share_of_batch = norm.running_var - 0.9 * torch.from_numpy(arrays[f"{name}.running_var"])
        norm.running_var -= share_of_batch / counts[name]
    actual, expected = visual_to_torch(trained["visual"], moved), recognizer.state_dict()
    for name in actual:
        if name.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(
                expected[name], actual[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
    recognizer.eval()
    evaluated = loss_torch().item()  # before the training mode moves the statistics again
    recognizer.train()
    np.testing.assert_allclose(after, [loss_torch().item(), evaluated], rtol=1e-4)
    assert abs(after[0] - before) > 0.01  # the step did something


def statistics_of(batch, recognizer, norms):
    """Sets the batch norms to the batch's statistics; returns the number of values per feature that
    each norm saw.
    """
    counts = {}

    def count(name):
        return lambda _, inputs, __: counts.update({name: inputs[0].numel() // inputs[0].shape[1]})

    hooks = [norm.register_forward_hook(count(name)) for name, norm in norms.items()]
    for norm in norms.values():
        norm.momentum = 1.0
    with torch.no_grad():
        recognizer.train()(batch)
    for norm, hook in zip(norms.values(), hooks, strict=True):
        norm.momentum = 0.1
        hook.remove()
    return counts
