"""Saved workflows read as ComfyUI's page reads them: what is wrong with one, and its API form."""

import json
import re
from itertools import combinations, product

from PIL import Image

from support import ROOT

USERS = sorted(ROOT.glob("workflows/*.json"))
DEMO = sorted(ROOT.glob("demo/workflows/*.json"))
BLUEPRINT = ROOT / "subgraphs" / "TACA text to image.json"
APP = ".app.json"  # opens in App Mode, a form with some of the widgets and the results
# Threads that wait for one another stand still on a busy machine, and the demo's model needs none.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NOTES = ("MarkdownNote", "Note")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "CURVE", "COMFY_DYNAMICCOMBO_V3")
CONTROL = ("fixed", "increment", "decrement", "randomize")
SOCKET = object()  # in place of a value
TITLE = 30  # the height of a node's title, which lies above its position
# What a user must put there, by widget: the folder of models, or of pictures in input/.
MODELS = {
    "unet_name": "diffusion_models",
    "ckpt_name": "checkpoints",
    "vae_name": "vae",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "clip_name3": "text_encoders",
    "lora_name": "loras",
}
# ... and where that is published: file -> folder, address.
PUBLISHED = json.loads((ROOT / "assets/models.json").read_text("utf-8"))
PACK = "comfyui-taca"  # the folder of custom_nodes that a server of ours has it in
VISION = "CLIPVisionLoader"  # whose clip_name is of a folder of its own
PICTURES = "folder"
PICTURE_OF = ("LoadImage", "image")  # ... or one of those pictures, by node and widget
UPLOAD = "image_upload"  # that widget's option


def read(path):
    return json.loads(path.read_text("utf-8"))


def nodes_of(workflow):
    """The nodes that do something."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def app_form(workflow):
    """The same workflow, to be opened in App Mode."""
    return workflow | {"extra": workflow["extra"] | {"linearMode": True}}


def source_of(node, info, core):
    """Properties that tell the page where a node and its models come from, as in core's templates.

    Parameters
    ----------
    node : dict
        As saved.
    info : dict
        The server's about nodes of this type.
    core : str
        ComfyUI's version.
    """
    module = info["python_module"].split(".")
    if module[0] != "custom_nodes":
        source = {"cnr_id": "comfy-core", "ver": core}
    elif module[1] == PACK:
        project = (ROOT / "pyproject.toml").read_text("utf-8")
        name, version = (
            re.search(rf'^{k} = "(.+)"', project, re.M)[1] for k in ("name", "version")
        )
        source = {"cnr_id": name, "ver": version}
    else:  # the demo's, which are in no registry
        source = {}
    names = [name for name in node.get("widgets_values", ()) if name in PUBLISHED]
    models = [
        {"name": name, "url": PUBLISHED[name][1], "directory": PUBLISHED[name][0]} for name in names
    ]
    return source | ({"models": models} if models else {})


def specs_of(inputs, order=None, prefix=""):
    """Name, type, options and whether it is required, of all inputs in their order."""
    for group in ("required", "optional"):
        for name in (order or inputs).get(group, ()):
            kind, *options = inputs[group][name]
            options = options[0] if options else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            yield prefix + name, kind, options, group == "required"


def inputs_of(node, info):
    """Name, type, options, whether required, and value of each input, as the page lays them out.

    In ``widgets_values`` a seed is followed by what becomes of it after a run, and a choice that
    brings inputs of its own by those. A value that is missing is None; one that is left over, and
    what becomes of a seed, has no name.
    """
    values = list(node.get("widgets_values", []))
    todo = list(specs_of(info["input"], info["input_order"]))
    while todo:
        name, kind, options, required = todo.pop(0)
        if kind == "IMAGECOMPARE":  # the page saves nothing of it, and sends two empty names
            yield name, kind, options, required, {"__value__": ["", ""]}
            continue
        if kind not in WIDGETS or options.get("forceInput"):
            yield name, kind, options, required, SOCKET
            continue
        value = values.pop(0) if values else None
        yield name, kind, options, required, value
        seed = name.split(".")[-1] in ("seed", "noise_seed")
        if kind == "INT" and options.get("control_after_generate", seed):
            yield None, "COMBO", {"options": CONTROL}, True, values.pop(0) if values else None
        if options.get(UPLOAD):  # its button, whose value is not sent
            del values[:1]
            yield "upload", "IMAGEUPLOAD", {}, False, SOCKET
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = [option for option in options["options"] if option["key"] == value]
            todo[:0] = [s for o in chosen for s in specs_of(o["inputs"], prefix=name + ".")]
    for value in values:
        yield None, None, {}, True, value


def fits(name, kind, options, value):
    """Whether a value is one that the widget can hold."""
    if kind in ("INT", "FLOAT"):
        number = int if kind == "INT" else (int, float)
        low, high = options.get("min", value), options.get("max", value)
        return isinstance(value, number) and not isinstance(value, bool) and low <= value <= high
    if kind == "COMBO":
        if name in MODELS:
            return isinstance(value, str) and value.endswith((".safetensors", ".pth"))
        picture = name == PICTURES or options.get(UPLOAD)
        return value in options["options"] or (picture and isinstance(value, str))
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return value in [option["key"] for option in options["options"]]
    return isinstance(
        value, {"STRING": str, "BOOLEAN": bool, "CURVE": dict, "IMAGECOMPARE": dict}.get(kind, ())
    )


def problems_of(workflow, object_info):
    """What ComfyUI would not understand, in words; empty if the workflow is right."""
    problems = []
    by_id = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    for node in nodes_of(workflow):
        if node["type"] not in object_info:
            problems.append(f"no node {node['type']}")
            continue
        info = object_info[node["type"]]
        where = f"{node['type']} {node['id']}"
        sockets = {socket["name"]: socket for socket in node.get("inputs", [])}
        kinds = {}
        for name, kind, options, required, value in inputs_of(node, info):
            kinds[name] = kind
            if value is SOCKET:
                if required and sockets.get(name, {}).get("link") is None:
                    problems.append(f"{where}: {name} is not connected")
            elif not fits(name, kind, options, value):
                problems.append(f"{where}: {name} is {value!r}")
        for name, socket in sockets.items():
            if name not in kinds:
                problems.append(f"{where}: no input {name}")
            elif socket["type"] not in (kinds[name], "*"):
                problems.append(f"{where}: {name} is a {socket['type']}")
            if socket["link"] is not None and socket["link"] not in links:
                problems.append(f"{where}: {name} has no link {socket['link']}")
        if [output["type"] for output in node.get("outputs", [])] != info["output"]:
            problems.append(f"{where}: its outputs are not {info['output']}")
    for link, source, output, target, socket, kind in links.values():
        try:
            start = by_id[source]["outputs"][output]
            end = by_id[target]["inputs"][socket]
        except (KeyError, IndexError):
            problems.append(f"link {link} hangs")
            continue
        if link not in (start["links"] or ()) or end["link"] != link:
            problems.append(f"link {link}: its ends do not know it")
        # A socket that takes several kinds names them all.
        if start["type"] != kind or not {kind, "*"} & {*end["type"].split(",")}:
            problems.append(f"link {link} joins {start['type']} and {end['type']}")
    for a, b in combinations(workflow["nodes"], 2):
        (ax, ay), (aw, ah), (bx, by), (bw, bh) = a["pos"], a["size"], b["pos"], b["size"]
        if ax < bx + bw and bx < ax + aw and ay - TITLE < by + bh and by - TITLE < ay + ah:
            problems.append(f"{a['type']} {a['id']} and {b['type']} {b['id']} overlap")
    # Each frame holds its nodes, and no part of another's.
    for group, node in product(workflow["groups"], nodes_of(workflow)):
        (gx, gy, gw, gh), (x, y), (w, h) = group["bounding"], node["pos"], node["size"]
        inside = gx <= x and x + w <= gx + gw and gy <= y - TITLE and y + h <= gy + gh
        apart = gx >= x + w or x >= gx + gw or gy >= y + h or y - TITLE >= gy + gh
        if not inside and not apart:
            problems.append(f"{node['type']} {node['id']} sticks out of {group['title']}")
    return problems


def api_form(workflow, object_info):
    """What the page would send to the server: node id -> class_type and inputs."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in nodes_of(workflow):
        inputs = {
            name: value
            for name, _, _, _, value in inputs_of(node, object_info[node["type"]])
            if name and value is not SOCKET
        }
        inputs |= {
            socket["name"]: links[socket["link"]]
            for socket in node.get("inputs", [])
            if socket["link"] is not None
        }
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def place_files(base, workflows):
    """Files of the names that workflows ask for, so that the page offers them; the models empty.

    Returns
    -------
    set of (str, Path)
        The folders of models, for ``serving``.
    """
    folders = set()
    for workflow in workflows:
        for node in nodes_of(workflow):
            names = [s["name"] for s in node.get("inputs", []) if s.get("widget")]
            for name, value in zip(names, node.get("widgets_values", []), strict=False):
                if name == PICTURES:
                    (base / "input" / value).mkdir(parents=True, exist_ok=True)
                elif (node["type"], name) == PICTURE_OF:
                    (base / "input").mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (64, 64), "gray").save(base / "input" / value)
                elif name in MODELS:
                    kind = "clip_vision" if node["type"] == VISION else MODELS[name]
                    folder = base / "stand_ins" / kind
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / value).touch()
                    folders.add((kind, folder))
    return folders


def blueprint_of(server):
    """The blueprint as the server lists and serves it."""
    [(number, entry)] = [
        (number, entry)
        for number, entry in server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"] == "custom_nodes.comfyui-taca"
    ]
    assert entry["name"] == BLUEPRINT.stem
    return number, server.get(f"/global_subgraphs/{number}")
