"""torch.compile as core's TorchCompileModel and KJNodes' nodes apply it."""

from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

from support import tiny

LISTS = ("double_blocks", "single_blocks", "joint_blocks")


def load(folder, kind, whole=True):
    """The tiny model; to be traced whole, which takes the longer the deeper it is, the shortest."""
    return tiny.load(folder, "flux-short" if whole and kind == "flux" else kind)


def compiled(model, whole, backend="eager", lists=LISTS):
    """As TorchCompileModel does for a whole model, and KJNodes for each block."""
    modules = dict(model.model.diffusion_model.named_modules())
    keys = (
        ["diffusion_model"]
        if whole
        else [f"diffusion_model.{n}.{i}" for n in lists for i in range(len(modules.get(n, ())))]
    )
    model = model.clone()
    set_torch_compile_wrapper(
        model, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict}, keys=keys
    )
    return model
