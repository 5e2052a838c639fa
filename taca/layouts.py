"""Where text and image tokens sit in the joint sequence of a block.

A ``Locate`` returns the layout of a block's joint sequence, given the block's arguments and what
earlier blocks of the same call recorded in ``CallState``. Tokens lie on axis 1 of ``(b, n, c)``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .spans import Kind, Layout, Span
from .swap import Args, Kwargs


@dataclass
class CallState:
    """What one call of the model has shown so far; made for the call and dropped with it."""

    # Text tokens: the conditioning's, until a block shows how many the model made of them, which a
    # single-stream block does not.
    num_text: int = 0
    num_prefix: int = 0  # tokens before the text: registers, or a vision encoder's
    num_other: int = 0  # tokens between text and image
    num_cached: int = 0  # tokens at the start that are keys only, since the model caches them
    # For each reference the text token that it stands before, and its number of tokens.
    references: Sequence[tuple[int, int]] = ()


Locate = Callable[[Args, Kwargs, CallState], Layout]
"""``(args, kwargs, state) -> layout`` of a block; empty where it has no text to attend to."""


def two_streams(text: tuple[int, str], image: tuple[int, str], image_first: bool = False) -> Locate:
    """A block that takes text and image as two arguments, and attends to both in one sequence.

    That is ``[prefix | text | image]``, or ``[image | text]`` with ``image_first``. ``text`` and
    ``image`` are the positions and the names of the arguments.
    """
    (text_at, text_name), (image_at, image_name) = text, image

    def locate(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
        # Without _argument, to save calls: this runs in every block inside the window.
        text_tokens = kwargs[text_name] if text_name in kwargs else args[text_at]
        image_tokens = kwargs[image_name] if image_name in kwargs else args[image_at]
        state.num_text = text_tokens.shape[1] - state.num_prefix
        if not state.num_text:
            return ()
        prefix = (Span("other", state.num_prefix),) if state.num_prefix else ()
        spans = (*prefix, Span("text", state.num_text), Span("image", image_tokens.shape[1]))
        return spans[::-1] if image_first else spans

    return locate


def one_stream(sequence: tuple[int, str], image_first: bool = False) -> Locate:
    """A block that takes ``[prefix | text | other | image]`` as one tensor, or the reverse."""
    position, name = sequence

    def locate(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
        num_tokens = (kwargs[name] if name in kwargs else args[position]).shape[1]
        # Some models tell where the image begins, even if a cache skips their two-stream blocks.
        options = kwargs.get("transformer_options") or {}
        begins = options.get("img_slice")
        num_text = begins[0] - state.num_prefix if begins else state.num_text
        if not num_text:
            return ()
        num_image = num_tokens - state.num_prefix - num_text - state.num_other
        prefix = (Span("other", state.num_prefix),) if state.num_prefix else ()
        others = (Span("other", state.num_other),) if state.num_other else ()
        spans = (*prefix, Span("text", num_text), *others, Span("image", num_image))
        return spans[::-1] if image_first else spans

    return locate


def with_prefix(num_prefix: int, locate: Locate) -> Locate:
    """A block whose text argument begins with this many tokens that are not text."""

    def locate_with_prefix(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
        state.num_prefix = num_prefix
        return locate(args, kwargs, state)

    return locate_with_prefix


def records_length(field: str) -> Locate:
    """A block that is not joint: it sets this field of ``CallState`` to the length of its ``x``."""

    def locate(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
        setattr(state, field, _argument(args, kwargs, 0, "x").shape[1])
        return ()

    return locate


def records_only(locate: Locate) -> Locate:
    """A joint block without TACA, which still records where its tokens are."""

    def locate_nothing(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
        locate(args, kwargs, state)
        return ()

    return locate_nothing


def text_alone(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """A block in which the text attends to itself."""
    return (Span("text", _argument(args, kwargs, 0, "x").shape[1]),)


def mochi(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """``[image | text]``; the block itself crops the padding of its text."""
    image, text = _argument(args, kwargs, 0, "x"), _argument(args, kwargs, 2, "y")
    return Span("image", image.shape[1]), Span("text", min(text.shape[1], kwargs["crop_y"]))


def uvit(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """``[image | time | text]``; text that the block takes as its own argument is keys only."""
    takes_part = _argument(args, kwargs, 1, "text") is None
    num_image = _argument(args, kwargs, 0, "x").shape[1] - 1 - takes_part * state.num_text
    return Span("image", num_image), Span("other", 1), Span("text", state.num_text, takes_part)


def minimax(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """The segments in which the model modulates its tokens: rows for image, text and sound.

    Pictures in the prompt count as image, since they are modulated as such. Sound is "other".
    """
    kinds: tuple[Kind, ...] = ("image", "text", "other")
    segments = _argument(args, kwargs, 2, "mod_segments")
    layout = tuple(Span(kinds[row % 3], stop - start) for start, stop, row in segments)
    return layout if any(span.kind == "text" and span.length for span in layout) else ()


def hidream_o1(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """``[text | time | image]``, with the vision encoder's tokens after the first three of text.

    Everything before the time token is causal, as in a language model, and its keys are cached.
    """
    num_tokens = _argument(args, kwargs, 0, "x").shape[1]
    if kwargs["past_key_value"]:
        num_tokens += kwargs["past_key_value"][2]
    num_text = state.num_text - 1
    num_vision = state.num_cached - num_text
    text: Layout = (Span("text", num_text, False),)
    if num_vision > 0:
        rest = Span("text", num_text - 3, False)
        text = (Span("text", 3, False), Span("other", num_vision, False), rest)
    return (*text, Span("other", 1), Span("image", num_tokens - state.num_cached - 1))


def qwen_image21(args: Args, kwargs: Kwargs, state: CallState) -> Layout:
    """``[text with references in it | image]``; a block may be called with the image alone.

    What comes before the image does not attend to it, and its keys are cached: it stays as it is,
    and only the image's queries get adjusted keys. In a call with that part alone, which fills the
    cache, there is nothing to adjust.
    """
    num_tokens = _argument(args, kwargs, 0, "x").shape[1]
    num_before = _argument(args, kwargs, 4, "prefix_len")
    if not state.num_text or num_before == num_tokens:
        return ()
    spans: list[Span] = []
    begin = 0
    for end, length in state.references:
        spans += Span("text", end - begin, False), Span("image", length, False)
        begin = end
    spans.append(Span("text", state.num_text - begin, False))
    return (*spans, Span("image", num_tokens - num_before))


class TextPlaces(NamedTuple):
    """Where the tokens of a prompt are among the text tokens of a call."""

    copies: Sequence[Mapping[int, int]]  # token -> place, for each time that the call repeats it
    num_text: int  # text tokens of the call


class ExtraText(NamedTuple):
    """A model's text tokens besides its conditioning's: 1 for the prompt's, 0 for others."""

    before: Sequence[float] = ()
    after: Sequence[float] = ()
    dropped: frozenset[int] = frozenset()  # tokens of the conditioning that are no text in it
    source: str = ""  # their name in the conditioning, where they are the prompt's too

    def kept(self, count: int) -> list[int]:
        """Which of the conditioning's ``count`` tokens are text in the model."""
        return [i for i in range(count) if i not in self.dropped]

    def with_prompt(self, prompt: Sequence[float]) -> list[float]:
        """Values of all text tokens, given those of the conditioning's."""
        return [*self.before, *(prompt[i] for i in self.kept(len(prompt))), *self.after]

    def places(self, num_prompt: int, repeats: int, is_whole: bool) -> TextPlaces:
        """Where ``num_prompt`` tokens are, so many times the same prompt.

        ``is_whole``: its tokens are counted from the first text token of the model's.
        """
        num_text = len(self.with_prompt([0.0] * num_prompt))
        places = {token: len(self.before) + n for n, token in enumerate(self.kept(num_prompt))}
        if is_whole:
            places = {token: token for token in range(num_text)}
        each = num_prompt // repeats
        copies = [
            {token - each * i: place for token, place in places.items() if token // each == i}
            for i in range(repeats)
        ]
        return TextPlaces(copies if repeats > 1 else [places], num_text)


FindExtraText = Callable[[nn.Module, int, Mapping[str, Any]], ExtraText]
"""``(model, length of the conditioning, arguments) -> extra text``."""


def no_extra_text(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """The text is the conditioning."""
    return ExtraText()


def cropped(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """Mochi drops its padding, PixelDiT everything beyond its maximum prompt length."""
    longest = getattr(model, "txt_max_length", None) or arguments.get("num_tokens", 256)
    return ExtraText(dropped=frozenset(range(longest, length)))


def time_token(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """HiDream-O1's last token is the timestep's."""
    return ExtraText(dropped=frozenset([length - 1]))


def pictures_in_text(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """What MiniMax-H3's encoder saw in pictures is image to the model, amid the text."""
    tags = (arguments.get("minimax_payload") or {}).get("text_token_tags")
    if tags is None:
        return ExtraText()
    return ExtraText(
        dropped=frozenset(i for i, tag in enumerate(tags.flatten().tolist()) if tag != 1)
    )


def padded(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """Z-Image pads each text to a multiple; the references' texts come first."""
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    references = len(arguments.get("ref_latents") or ())
    lengths = [text.shape[1] for text in arguments.get("ref_contexts") or ()]
    lengths += [1] * (references - len(lengths))
    full = [-(-each // multiple) * multiple for each in lengths]
    after = -length % multiple + sum(full[references:])
    return ExtraText([0.0] * sum(full[:references]), [0.0] * after)


def glyphs(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """ByT5's tokens of the text to be written: first in HunyuanVideo 1.5, last in HunyuanImage."""
    tokens = arguments.get("txt_byt5")
    if tokens is None or getattr(model, "byt5_in", None) is None:
        return ExtraText()
    own = [1.0] * tokens.shape[1]
    is_last = getattr(model, "cond_type_embedding", None) is None
    before, after = ([], own) if is_last else (own, [])
    return ExtraText(before, after, source="conditioning_byt5small")


def llama_tokens(model: nn.Module, length: int, arguments: Mapping[str, Any]) -> ExtraText:
    """HiDream-I1's Llama tokens: those of the last layer, and those of a layer for each block."""
    tokens = arguments.get("encoder_hidden_states_llama3")
    own = [] if tokens is None else [1.0] * (2 * tokens.shape[2])
    return ExtraText(after=own, source="conditioning_llama3")


def _argument(args: Args, kwargs: Kwargs, position: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[position]
