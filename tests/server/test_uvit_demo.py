"""The demo's workflow that trains a U-ViT, in full on a server."""

import io
import os
from unittest import mock

import numpy as np
import pytest
import world
from comfy_server import serving
from PIL import Image
from safetensors.torch import load_file

from support.workflow import ONE_THREAD, ROOT, api_form, read


@pytest.mark.slow
def test_the_demo_learns_to_draw_its_prompts(tmp_path):
    """The demo's workflow in full on a server: the loss falls, and by the checker the prompted
    shapes appear; from the saved file the same pictures, and those of another prompt it learnt.
    """
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(tmp_path / "base", tmp_path / "log") as server,
    ):
        graph = api_form(read(ROOT / "demo/workflows/10_U-ViT.json"), server.get("/object_info"))
        ids = {node["class_type"]: key for key, node in graph.items()}
        [prompt] = [n["inputs"] for n in graph.values() if n["inputs"].get("text")]
        first = pictures_of(server, server.run(graph)[ids["SaveImage"]])
        saved = next((tmp_path / "base/output/diffusion_models").glob("*.safetensors"))
        graph[ids["TrainUViT"]] = {"class_type": "LoadUViT", "inputs": {"unet_name": saved.name}}
        del graph[ids["SaveUViT"]]
        again = pictures_of(server, server.run(graph)[ids["SaveImage"]])
        told, prompt["text"] = prompt["text"], "a blue circle below a cyan circle"
        other = pictures_of(server, server.run(graph)[ids["SaveImage"]])
    checkpoint = next((tmp_path / "base/output/uvit").glob("*.safetensors"))
    losses = load_file(checkpoint)["training.losses"]
    assert losses[-100:].mean() < 0.1 * losses[:100].mean()
    for pictures, caption in ((first, told), (other, prompt["text"])):
        right = [world.check(picture, caption)["everything"] for picture in pictures]
        assert len(right) == 4
        assert sum(right) >= 3, caption
    assert np.abs(first - again).max() < 0.02


def pictures_of(server, output):
    """The pictures of a node's output, in [0, 1]."""
    files = [io.BytesIO(server.picture(image)) for image in output["images"]]
    return np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) / 255 for f in files])
