"""Training of U-ViT: its gradient, its checkpoints, its node."""

import dataclasses
import json

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.uvit import (
    FUSIONS,
    MODEL,
    TINY,
    TRAINING,
    UViTConfig,
    inputs,
    reference,
    reference_run,
    sample,
    without,
    write,
)
from support.words import weighed

RECIPE = {"batch_size": 4, "learning_rate": 1e-3, "warm_up": 3, "ema": 0.9, "bf16": False}


def data_of(pictures=6):
    x, _, context = inputs(UViTConfig(**TINY), 3)
    times = pictures // 3
    return TRAINING.Data(
        x.repeat(times, 1, 1, 1), context.repeat(times, 1, 1), context[:1] * 0, 0.5
    )


def training(folder, config=None, name="it", data=None, **changes):
    config = config or UViTConfig(**TINY, image_blocks=1)
    recipe = TRAINING.Recipe(**RECIPE | changes)
    return TRAINING.Training(config, recipe, data or data_of(), folder / f"{name}.safetensors")


@pytest.fixture
def grad():
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("fusion", ["central", "two streams", "two streams, text as keys"])
def test_a_stopped_training_goes_on_to_the_bit(tmp_path, grad, fusion):
    """Stopped by an interrupt between two checkpoints, and by the end."""
    config = UViTConfig(**TINY | FUSIONS[fusion])
    whole = training(tmp_path, config, name="whole")
    whole.run(9, 100, lambda running: None)

    def interrupt(running):
        if running.step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        training(tmp_path, config).run(9, 100, interrupt)
    second = training(tmp_path, config)
    assert second.step == 4
    second.run(6, 100, lambda running: None)
    resumed = training(tmp_path, config)
    assert resumed.step == 6
    resumed.run(9, 100, lambda running: None)
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "it")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert len(resumed.losses) == 9
    loaded = MODEL.load_uvit(str(tmp_path / "it.safetensors")).model.diffusion_model
    assert torch.equal(loaded.pos_embed, resumed.average["pos_embed"])


def test_a_checkpoint_of_another_training_is_told(tmp_path, grad):
    training(tmp_path).run(1, 1, lambda running: None)
    for changes, told in (
        ({"seed": 1}, "seed 0, now 1"),
        ({"config": UViTConfig(**TINY)}, r"another network \(image_blocks 1, now 0\)"),
        ({"config": UViTConfig(**TINY, image_blocks=1, caption_blocks=0)}, "_blocks None, now 0"),
        (
            {"config": UViTConfig(**TINY | {"width": 64, "blocks": 3}, image_blocks=1)},
            "blocks 5, now 3, width 128, now 64",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            training(tmp_path, **changes)
    write(tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=r"it\.safetensors is not a checkpoint"):
        training(tmp_path)


def test_a_checkpoint_of_other_data_is_told(tmp_path, grad):
    """More, others, in another order; one among 900, picture or caption; not the last bits of those
    encoded anew.
    """
    training(tmp_path).run(1, 1, lambda running: None)
    many, one, two = data_of(900), data_of(900), data_of(900)
    one.latents[17] = one.latents[17].flip(0)
    two.context[17] = two.context[17].flip(0)
    training(tmp_path, name="many", data=many).run(1, 1, lambda running: None)
    data = data_of()
    for told, name, changed in (
        ("other pictures; other captions[.]", "it", data_of(9)),
        ("other pictures[.]", "it", dataclasses.replace(data, latents=data.latents.flip(0))),
        ("other pictures[.]", "it", dataclasses.replace(data, latents=1.01 * data.latents)),
        ("other captions[.]", "it", dataclasses.replace(data, context=data.context.flip(0))),
        ("another empty prompt", "it", dataclasses.replace(data, empty=data.context[:1])),
        ("latent_scale 0.5, now 0.6", "it", dataclasses.replace(data, latent_scale=0.6)),
        ("other pictures[.]", "many", one),
        ("other captions[.]", "many", two),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors was.*{told}.*another name"):
            training(tmp_path, name=name, data=changed)
    noise = torch.randn(data.latents.shape, generator=torch.manual_seed(0))
    latents = data.latents * (1 + 1e-3 * noise)
    anew = dataclasses.replace(data, latents=latents, latent_scale=0.5001)
    assert training(tmp_path, data=anew).step == 1


EARLIER = {"no data": {}, "a sketch": {"data": {"latents": [6, 4, 8, 8, 39.0, 0.1, 0.2, 0.3, 0.4]}}}


@pytest.mark.parametrize("kept", EARLIER)
def test_a_checkpoint_without_samples_of_its_data_resumes(tmp_path, grad, caplog, kept):
    """As those of earlier versions; the next checkpoint has them."""
    training(tmp_path).run(1, 1, lambda running: None)
    path = tmp_path / "it.safetensors"
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["uvit"]) | EARLIER[kept]
    save_file(without(load_file(path), "training.data"), path, {"uvit": json.dumps(said)})
    running = training(tmp_path, data=data_of(9))
    assert "it.safetensors is of an earlier version" in caplog.text
    running.run(2, 1, lambda running: None)
    with pytest.raises(ValueError, match="other pictures"):
        training(tmp_path)


def test_a_training_that_diverges_is_told(tmp_path, grad):
    running = training(tmp_path, learning_rate=1e30, warm_up=0)
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        running.run(50, 1, lambda running: None)
    state = load_file(tmp_path / "it.safetensors")
    assert all(w.isfinite().all() for w in state.values() if w.is_floating_point())


def test_a_network_that_diverged_is_not_saved(tmp_path, grad):
    """Its loss may still be finite: weights of an earlier step stay, and the error names the step;
    also where the run is interrupted.
    """
    running = training(tmp_path)
    running.run(2, 1, lambda running: None)

    def overflow(running):
        with torch.no_grad():
            running.average["norm.weight"][3] = torch.nan
        if running.step == 4:
            raise comfy.model_management.InterruptProcessingException

    for every in (1, 100):
        with pytest.raises(RuntimeError, match=r"network became NaN.* step .*lower the learning"):
            training(tmp_path).run(9, every, overflow)
        assert training(tmp_path).step == 2


@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_is_that_of_the_published_loss(tmp_path, grad, bf16):
    """The first step's loss and update, from the reference network in float64."""
    running = training(tmp_path, bf16=bf16, p_uncond=0.5, warm_up=0, learning_rate=1e-4)
    before = {k: w.detach().clone() for k, w in running.network.state_dict().items()}
    drawn = torch.Generator().manual_seed(1)
    chosen = torch.randint(6, (4,), generator=drawn)
    t = torch.randint(1, 1001, (4,), generator=drawn)
    empty = torch.rand(4, generator=drawn) < 0.5
    noise = torch.randn(4, 4, 8, 8, generator=drawn)
    assert empty.any()
    assert not empty.all()
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[t - 1][:, None, None, None]
    noisy = kept**0.5 * running.data.latents[chosen] + (1 - kept) ** 0.5 * noise
    context = running.data.context[chosen] * ~empty[:, None, None]
    leaves = {
        k: w.double().requires_grad_(w.is_floating_point())
        for k, w in before.items()
        if w.is_floating_point()
    }
    loss = (reference(leaves, noisy, t, context, 5, 2, 1, 3) - noise).square().mean()
    loss.backward()
    running.run(1, 1, lambda running: None)
    assert running.losses[0] == pytest.approx(loss.item(), rel=1e-2 if bf16 else 1e-5)
    if not bf16:  # AdamW's first step is the gradient's sign
        after = running.network.state_dict()
        for key, leaf in leaves.items():
            moved = after[key] - before[key] * (1 - 1e-4 * 0.03)
            clear = leaf.grad.abs() > 1e-5
            assert torch.allclose(
                moved[clear], -1e-4 * leaf.grad[clear].sign().float(), atol=1e-5
            ), key


NODE = {
    "fusion": "intermediate",
    "text_blocks": 1,
    "conditioning": "concatenation",
    "blocks": 3,
    "width": 64,
    "steps": 40,
    "batch_size": 6,
    "learning_rate": 3e-3,
    "warm_up": 5,
    "ema": 0.9,
    "p_uncond": 0.1,
    "precision": "fp32",
    "seed": 0,
    "checkpoint": "it",
    "checkpoint_every": 100,
}


@pytest.fixture
def train_node(pack, tmp_path, monkeypatch):
    """Train U-ViT as core calls it: all inputs in lists, in inference mode."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    config = UViTConfig(**TINY)

    def run(latents=None, positive=None, negative=None, **changes):
        x, _, context = inputs(config, 3)
        with torch.inference_mode():
            if latents is None:
                latents = [{"samples": x[i : i + 1]} for i in range(3)]
            if positive is None:
                positive = [[[context[i : i + 1], {}]] for i in range(3)]
            if negative is None:
                negative = [[[torch.zeros(1, *context.shape[1:]), {}]]]
            settings = {name: [value] for name, value in (NODE | changes).items()}
            return pack["TrainUViT"].execute(latents, positive, negative, **settings)

    return run


def test_the_node_trains(train_node, tmp_path):
    """The loss falls, the plot is shown, the model samples; started again, it is there."""
    out = train_node()
    losses = load_file(tmp_path / "uvit/it.safetensors")["training.losses"]
    assert len(losses) == 40
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
    model, plot = out.result
    assert plot.shape == (1, 360, 720, 3)
    assert out.ui["images"]
    assert "40 steps" in out.ui["text"][0]
    config = model.model.diffusion_model.config
    assert (config.image_blocks, config.caption_blocks, config.blocks) == (1, None, 3)
    assert model.model.latent_format.scale_factor == 0.23010
    expected = reference_run(config, model.model.diffusion_model.state_dict(), scale=0.23010)
    assert (sample(model, config) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(sample(train_node().result[0], config), sample(model, config))
    with pytest.raises(ValueError, match="40 steps already"):
        train_node(steps=39)


def test_more_text_blocks_than_blocks(train_node):
    """An error with intermediate fusion; with early fusion the widget does not count."""
    with pytest.raises(ValueError, match="text_blocks is 9, and the network has 3 blocks"):
        train_node(text_blocks=9, steps=1)
    early = train_node(text_blocks=9, steps=1, fusion="early").result[0]
    assert early.model.diffusion_model.config.image_blocks == 0


@pytest.mark.parametrize("conditioning_by", ["concatenation", "cross-attention"])
def test_the_node_trains_two_streams(train_node, conditioning_by):
    """By the author's names; where a workflow has no inputs for them, with c = v = 3."""
    chosen = {"fusion": "two streams", "conditioning": conditioning_by, "steps": 2}
    model = train_node(**chosen, caption_blocks=2, image_blocks=1).result[0]
    network = model.model.diffusion_model
    config = network.config
    assert (config.blocks, config.image_blocks, config.caption_blocks) == (3, 1, 2)
    assert config.conditioning == conditioning_by
    expected = reference_run(config, network.state_dict(), scale=0.23010)
    assert (sample(model, config) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match=r"3 blocks has at most 1 at each end.*not 3"):
        train_node(**chosen)


def test_an_interrupt_keeps_the_checkpoint(train_node, tmp_path, monkeypatch):
    """The page's Stop button, pressed as the progress bar begins."""

    def press(value, total, *args, **kwargs):
        assert total == 40
        comfy.model_management.interrupt_current_processing(value == 1)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_node()
    assert len(load_file(tmp_path / "uvit/it.safetensors")["training.losses"]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    assert train_node().ui["text"][0].startswith("40 steps")


def test_one_batch_and_other_latents(train_node):
    """As the demo's dataset has them; and a scale of their own where there is no published one."""
    x = 5 * torch.randn(3, 16, 8, 8, generator=torch.manual_seed(0))
    _, _, context = inputs(UViTConfig(**TINY), 3)
    out = train_node(
        [{"samples": x}],
        [[[c[None], {}] for c in context]],
        steps=2,
        fusion="early",
        conditioning="cross-attention",
        precision="bf16",
    )
    model = out.result[0].model
    assert model.latent_format.scale_factor == pytest.approx(1 / x.std().item(), abs=1e-4)
    assert model.diffusion_model.config.image_blocks == 0
    assert model.diffusion_model.joint is None
    # On a CPU: without the instructions for bf16 a step takes a hundred times as long.
    assert out.ui["text"][0].endswith("choose fp32 as precision.")


SOME = torch.randn(3, 4, 8, 8, generator=torch.manual_seed(0))
BAD_DATA = {
    "square": {"latents": [{"samples": torch.zeros(3, 4, 8, 6)}]},
    "of one size": {"latents": [{"samples": torch.zeros(1, 4, s, s)} for s in (8, 8, 6)]},
    "multiple of 16": {"latents": [{"samples": torch.zeros(3, 4, 7, 7)}]},
    "are nested": {"latents": [{"samples": NestedTensor([torch.zeros(1, 4, 8, 8)] * 2)}]},
    "no pictures": {"latents": []},
    "no pictures: ": {"latents": [{"samples": torch.zeros(0, 4, 8, 8)}]},
    "no captions": {"positive": [[]]},
    "no empty prompts": {"negative": [[]]},
    "of 3 pictures 1 hold NaN or infinity, the first is number 2": {
        "latents": [{"samples": SOME / torch.tensor([1.0, 0.0, 1.0])[:, None, None, None]}]
    },
    "of 3 captions 2 hold NaN": {
        "positive": [[[torch.zeros(3, 7, 48) / torch.tensor([1.0, 0, 0])[:, None, None], {}]]]
    },
    "of 1 empty prompts 1 hold": {"negative": [[[torch.full((1, 7, 48), torch.nan), {}]]]},
    "has 2 different ones": {"negative": [[[torch.zeros(1, 7, 48) + i, {}]] for i in range(2)]},
    "all numbers of the latents are equal": {"latents": [{"samples": torch.zeros(3, 4, 8, 8)}]},
    "an empty latent": {"latents": [{"samples": torch.ones(3, 16, 8, 8)}]},
    "2 captions": {"positive": [[[torch.zeros(2, 7, 48), {}]]]},
    "14 x 48, 7 x 48": {"positive": [[[torch.zeros(3, 14, 48), {}]]]},
    "no name for a checkpoint": {"checkpoint": "../it"},
    "odd number": {"blocks": 4},
}


@pytest.mark.parametrize("told", BAD_DATA)
def test_bad_data_is_told(train_node, told):
    with pytest.raises(ValueError, match=told):
        train_node(**BAD_DATA[told])


def test_word_weights_do_not_train(train_node, caplog):
    """As in core's trainer: what trains is the text, and that is said."""
    _, _, context = inputs(UViTConfig(**TINY), 3)
    prompts = [weighed([[c[None], {}]], [1.0, 2.0] + [1.0] * 5) for c in context]
    out = train_node(positive=prompts, steps=1)
    assert out.ui["text"][0].endswith("word weights do not act in training.")
    assert "word weights do not act in training" in caplog.text
