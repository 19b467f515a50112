"""ResNet equals torchvision's (rewritten in torch); pooling, batch norm, map sizes, parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sicot_jax.models.layers import BatchNorm, max_pool_3x3
from sicot_jax.models.resnet import ResNet, global_average_pool


def make(depth=18, width=4, stem="imagenet", last_stride=2, dtype=jnp.float32):
    return ResNet(
        depth=depth,
        width=width,
        stem=stem,
        last_stride=last_stride,
        dtype=dtype,
        rng=np.random.default_rng(0),
    )


def torch_resnet(torch, depth, width):
    """Torchvision's ResNet without its last layer (v1.5: the stride sits in the 3x3)."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, planes, stride):
            super().__init__()
            if depth >= 50:
                outputs, sizes = (
                    4 * planes,
                    [
                        (inputs, planes, 1, 1),
                        (planes, planes, 3, stride),
                        (planes, 4 * planes, 1, 1),
                    ],
                )
            else:
                outputs, sizes = planes, [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
            self.convs = nn.ModuleList(
                nn.Conv2d(i, o, k, s, padding=k // 2, bias=False) for i, o, k, s in sizes
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
            self.downsample = None
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            y = x
            for i, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                y = norm(convolution(y))
                if i < len(self.convs) - 1:
                    y = torch.relu(y)
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    stem = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs, blocks = width, []
    for stage, count in enumerate({10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]):
        for number in range(count):
            blocks.append(Block(inputs, width * 2**stage, 2 if stage and not number else 1))
            inputs = width * 2**stage * (4 if depth >= 50 else 1)
    return nn.Sequential(*stem, *blocks)


def copy_convolution(conv, torch_conv):
    conv.kernel[...] = jnp.asarray(torch_conv.weight.detach().numpy().transpose(2, 3, 1, 0))


def copy_norm(norm, torch_norm):
    for name, value in [
        ("scale", torch_norm.weight),
        ("bias", torch_norm.bias),
        ("mean", torch_norm.running_mean),
        ("var", torch_norm.running_var),
    ]:
        getattr(norm, name)[...] = jnp.asarray(value.detach().numpy())


@pytest.mark.parametrize("depth", [10, 18, 50])
def test_features_equal_torch(depth):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    reference = torch_resnet(torch, depth, 4).eval()
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # distinct values for all four
                for values, low, high in [
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 1.5),
                ]:
                    values.uniform_(low, high, generator=generator)
            elif isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, fan_in**-0.5, generator=generator)
    model = make(depth)
    copy_convolution(model.conv1, reference[0])
    copy_norm(model.norm1, reference[1])
    blocks = [block for stage in model.stages for block in stage]
    for block, torch_block in zip(blocks, reference[4:], strict=True):
        for pair in zip(block.convs, torch_block.convs, strict=True):
            copy_convolution(*pair)
        for pair in zip(block.norms, torch_block.norms, strict=True):
            copy_norm(*pair)
        assert (block.downsample is None) == (torch_block.downsample is None)
        if block.downsample is not None:
            copy_convolution(block.downsample, torch_block.downsample[0])
            copy_norm(block.downsample_norm, torch_block.downsample[1])
    photo = (
        np.random.default_rng(1).normal(size=(2, 67, 50, 3)).astype(np.float32)
    )  # odd maps on the way
    with torch.no_grad():
        wanted = (
            reference(torch.from_numpy(photo.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        )
    graphdef, state = nnx.split(model)
    actual = np.asarray(
        jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, train=False))(state, photo)
    )
    assert actual.shape == wanted.shape == (2, 3, 2, model.num_features)
    assert (wanted > 0).mean() > 0.2  # not a comparison of zeros
    # Measured: 5e-7 of the greatest feature at either depth; sums are ordered otherwise on other
    # machines.
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(
        global_average_pool(jnp.asarray(actual)), actual.mean((1, 2)), rtol=1e-5
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (7, 6), (9, 9)])
def test_max_pool_and_its_gradient_equal_torch(height, width):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(height)
    # No two values alike: where values tie, torch gives the gradient to one of them, we to all.
    # All below zero: a padding of zeros would win.
    x = (rng.permutation(2 * height * width * 3).astype(np.float32) - 1000).reshape(
        2, height, width, 3
    )
    torch_input = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(torch_input, 3, 2, 1)
    weight = rng.normal(size=pooled.shape).astype(np.float32)
    (pooled * torch.from_numpy(weight)).sum().backward()

    def weighted(x):
        y = max_pool_3x3(x)
        return jnp.sum(y * weight.transpose(0, 2, 3, 1)), y

    gradient, pooled_by_jax = jax.jit(jax.grad(weighted, has_aux=True))(x)
    np.testing.assert_array_equal(pooled_by_jax, pooled.detach().numpy().transpose(0, 2, 3, 1))
    # rtol: a pixel of several windows gets a sum of up to four float32 numbers.
    np.testing.assert_allclose(
        gradient, torch_input.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6
    )


def test_batch_norm_by_hand():
    """Values 1, 3, 5, 7 in one channel: mean 4, biased variance 5. Channel two is constant."""
    norm = BatchNorm(2)
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 1.0]), jnp.array([0.5, -1.0])
    norm.mean[...] = jnp.array([10.0, 0.0])
    x = jnp.stack([jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.full((2, 2), 6.0)], -1)[
        :, :, None
    ]  # [2, 2, 1, 2]
    y = norm(x, train=True)
    np.testing.assert_allclose(
        y[..., 0].ravel(), 2 * np.array([-3, -1, 1, 3]) / np.sqrt(5 + 1e-5) + 0.5, rtol=1e-5
    )
    np.testing.assert_allclose(y[..., 1], -1, rtol=1e-6)
    np.testing.assert_allclose(norm.mean[...], [0.9 * 10 + 0.1 * 4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], [0.9 + 0.5, 0.9], rtol=1e-6)
    before = np.asarray(norm.mean[...])
    y = norm(x, train=False)
    np.testing.assert_allclose(y[0, 0, 0, 0], 2 * (1 - 9.4) / np.sqrt(1.4 + 1e-5) + 0.5, rtol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], before)  # evaluation changes nothing


def test_batch_norm_of_a_large_mean_keeps_its_digits():
    norm = BatchNorm(1)
    norm(jnp.array([[10001.0], [10003.0]]), train=True)
    np.testing.assert_allclose(norm.var[...], [0.9 + 0.1], rtol=1e-5)


def test_batch_norm_mask_leaves_rows_out():
    norm, alone = BatchNorm(2), BatchNorm(2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32).at[1].set(1000.0)
    mask = np.array([True, False, True, True])
    y = norm(x, train=True, mask=jnp.asarray(mask))
    wanted = alone(x[mask], train=True)
    np.testing.assert_allclose(
        np.asarray(y)[mask], wanted, rtol=1e-5, atol=1e-6
    )  # atol: values near the mean
    np.testing.assert_allclose(norm.mean[...], alone.mean[...], rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], alone.var[...], rtol=1e-5)


def test_batch_norm_without_a_row_keeps_its_running_values():
    norm = BatchNorm(2)
    norm.mean[...], norm.var[...] = jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0])
    y = norm(jnp.ones((2, 2)), train=True, mask=jnp.zeros(2, bool))
    np.testing.assert_array_equal(norm.mean[...], [3, 4])
    np.testing.assert_array_equal(norm.var[...], [5, 6])
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("stem", "last_stride", "photo", "wanted"),
    [
        ("imagenet", 2, (224, 224), (7, 7)),
        ("imagenet", 1, (224, 160), (14, 10)),
        ("half", 2, (32, 32), (2, 2)),
        ("half", 1, (33, 32), (5, 4)),
        ("small", 2, (32, 24), (4, 3)),
        ("small", 1, (32, 32), (8, 8)),
    ],
)
def test_map_sizes(stem, last_stride, photo, wanted):
    """Sizes at each halving are rounded up: 33 -> 17 -> 9 -> 5."""
    shape = jax.ShapeDtypeStruct((2, *photo, 3), jnp.float32)
    features = jax.eval_shape(
        lambda x: make(stem=stem, last_stride=last_stride)(x, train=False), shape
    )
    assert features.shape == (2, *wanted, 32)


@pytest.mark.parametrize(
    ("depth", "parameters", "features"), [(18, 11_176_512, 512), (50, 23_508_032, 2048)]
)
def test_number_of_parameters(depth, parameters, features):
    """Torchvision's resnet18 (11,689,512) and resnet50 (25,557,032) less their last layers of
    513,000 and 2,049,000.
    """
    model = []

    def build():
        model.append(make(depth, width=64))
        return nnx.state(model[0], nnx.Param)

    state = jax.eval_shape(build)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == parameters
    assert model[0].num_features == features


def test_bfloat16_computes_but_is_not_stored():
    def step(image):
        model = make(width=4, stem="small", dtype=jnp.bfloat16)
        graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)

        def loss(parameters):
            model = nnx.merge(graphdef, parameters, rest, copy=True)
            features = model(image, train=True)
            return jnp.sum(global_average_pool(features)), (
                features,
                nnx.state(model, nnx.BatchStat),
            )

        gradients, (features, stats) = jax.grad(loss, has_aux=True)(parameters)
        return features, global_average_pool(features), parameters, stats, gradients

    features, pooled, *kept = jax.eval_shape(step, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert features.dtype == jnp.bfloat16
    assert pooled.dtype == jnp.float32
    for tree in kept:
        leaves = jax.tree.leaves(tree)
        assert len(leaves) > 30
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 20}, r"model.depth=20, wanted one of \(10, 18, 34, 50, 101, 152\)"),
        ({"stem": "tiny"}, r"model.stem='tiny', wanted one of \('imagenet', 'half', 'small'\)"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
