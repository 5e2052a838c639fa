"""TACA Options: limits that the paper does not have, as one socket."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..taca.families import FAMILIES
from ..taca.options import Options, prompt_tokens

TACAOptionsSocket = io.Custom("TACA_OPTIONS")


class TACAOptions(io.ComfyNode):
    """Limits of gamma -> TACA_OPTIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACAOptions",
            display_name="TACA Options",
            category="TACA",
            description=(
                "For experiments: limits where gamma acts. All limits are off by default, as in "
                "the paper; none concerns a TACA LoRA. Connect it to TACA Patch Model."
            ),
            search_aliases=["taca", "positive only", "block range", "padding tokens"],
            inputs=[
                io.Boolean.Input(
                    "positive_only",
                    default=False,
                    tooltip=(
                        "Off: both halves of CFG are adjusted, as in the authors' code. On: the "
                        "negative prompt's half stays plain, so that CFG pulls away from it harder."
                    ),
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip=(
                        "Blocks in which gamma acts, such as 'double 0-9, single 0-18' (FLUX) or "
                        "'joint 0-11' (SD3); empty for all, as in the paper."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "With CLIP and the prompt connected, gamma acts on the prompt's own tokens "
                        "and not on the padding behind them. The paper scales padding too, so "
                        "pictures then differ from its own."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="The text of the positive prompt, the very one that is encoded.",
                ),
            ],
            outputs=[TACAOptionsSocket.Output("options", tooltip="For TACA Patch Model.")],
        )

    @classmethod
    def execute(
        cls, positive_only: bool, blocks: str, clip: Any = None, prompt: str | None = None
    ) -> io.NodeOutput:
        if (clip is None) != (prompt is None):
            raise ValueError(
                "TACA Options needs both clip and prompt to tell the prompt's tokens from padding: "
                "connect the other one too, or neither."
            )
        tokens = None if clip is None else prompt_tokens(tokens_of(clip, prompt or ""))
        return io.NodeOutput(Options(positive_only, blocks, tokens))


def tokens_of(clip: Any, prompt: str) -> list[list[list[int]]]:
    """The token ids of a prompt in the parts of its conditioning, by ComfyUI's own tokenizer.

    Raises
    ------
    ValueError
        If it is not the CLIP of a family whose conditioning is known.
    """
    tokenized = {
        name: [token for chunk in chunks for token, *_ in chunk]
        for name, chunks in clip.tokenize(prompt).items()
    }
    for family in FAMILIES:
        names = [name for part in family.text for name in part]
        # FLUX's pooled CLIP-L is tokenized too, and has no part in the text tokens.
        if names and set(names) <= set(tokenized) <= {*names, "l"}:
            return [[tokenized[name] for name in part] for part in family.text]
    known = "; ".join(family.name for family in FAMILIES if family.text)
    raise ValueError(
        f"TACA cannot tell the tokens of this CLIP ({', '.join(tokenized)}) apart; it can for "
        f"{known}. Leave clip and prompt open."
    )


NODES = [TACAOptions]
