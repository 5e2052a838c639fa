"""Whether a conditioning that another node made is of the text whose words are to weigh in it."""

import torch
from comfy.sd import CLIP
from torch import Tensor
from torch.nn.functional import normalize, pad

from .conditioning import Conditioning, sees_pictures
from .prompt_tokens import Table
from .words import WORDS_KEY, Words

TOLERANCE = 3e-3
"""Of one text encoded twice, relative: rounding in half precision, beside other rows or without."""

OTHER_TEXT = (
    "TACA: this conditioning is of another text, so the weights would be on the wrong words. "
    "Connect the CLIP and the text that made it, there without brackets."
)
OTHER_CLIP = (
    "TACA: this conditioning is of another text encoder, with tokens of {} channels in place of "
    "{}. Connect the CLIP and the text that made it."
)
NOT_MADE_OF_IT = (
    "TACA: this conditioning is not what the CLIP makes of the text. Right if another node has "
    "mixed or weighed it; otherwise the weights may be on the wrong words."
)


def check_text(conditioning: Conditioning, clip: CLIP, words: Words) -> list[str]:
    """What cannot be known about a conditioning and its text, for the user.

    The text is encoded once more. A token that stands for no word, as those of the text's end, has
    seen the whole of it, and ComfyUI's weights on embeddings leave it as it is: where these are
    equal, so is the text; where the encoder has none, all tokens have to be. Else another node may
    have mixed texts, or the CLIP is not quite the same. Even then, where texts are padded to one
    length, many tokens resemble the token at their own place most, and none with a weight, together
    with its neighbour, resembles another place more.

    Raises ValueError if it is of another text or text encoder, or already has words to avoid.
    """
    if any(each.get(WORDS_KEY) and each[WORDS_KEY].num_avoided for _, each in conditioning):
        raise ValueError(
            "TACA: this conditioning has words to avoid. Write the weights into the text of its "
            "TACA Text Encode, in place of a second node."
        )
    theirs = [each for each in conditioning if each[0].any()]  # Zero Out has no words
    if not theirs or not words.has_weights:
        return []
    of_clip = clip.encode_from_tokens(clip.tokenize(words.prompt.text), return_dict=True)
    made, warnings = _tokens(of_clip["cond"]), set[str]()
    own = torch.tensor(words.prompt.own()).bool()
    for text, extras in theirs:
        given = _tokens(text)
        if given.shape[1] != made.shape[1]:
            raise ValueError(OTHER_CLIP.format(given.shape[1], made.shape[1]))
        more = len(given) - len(made)
        if more > 0 and sees_pictures(clip):
            first = next((i for i, is_end in enumerate(_ends(words.prompt.table)) if not is_end), 0)
            if bool(_same(given[: len(made)], made)[first]):  # no picture stands before it
                raise ValueError(OTHER_TEXT)
            warnings.add(
                f"TACA takes the first {more} tokens of this conditioning for pictures'. If there "
                f"are none, it is of another text."
            )
        if more:
            continue
        pairs = [(given, made, words.prompt.table)]
        pairs += [
            (_tokens(extras[name]), _tokens(of_clip[name]), table)
            for name, table in words.prompt.beside.items()
            if extras.get(name) is not None
        ]
        if not all(_is_of(*pair) for pair in pairs):
            if not own.all() and not _is_like(given, made, own, words):
                raise ValueError(OTHER_TEXT)
            warnings.add(NOT_MADE_OF_IT)
    return sorted(warnings)


def _tokens(made: Tensor) -> Tensor:
    """The tokens ``(n, channels)`` of one row of a batch; of several layers the last."""
    return made.flatten(0, -3)[-1].float().cpu()


def _ends(table: Table) -> list[bool]:
    """Which tokens stand for no word: start, end, padding, those of a template."""
    return [all(token.start == token.end for token in row) for row in table]


def _is_of(text: Tensor, made: Tensor, table: Table) -> bool:
    """Whether a conditioning is of the text that ``made`` is of."""
    if len(text) != len(made):
        return False
    same, ends = _same(text, made), _ends(table)
    # Lumina 2's last token is a word, and its first has seen none. Tokens of one channel are ids,
    # which HiDream-O1 encodes in the model.
    if ends[-1] and made.shape[1] > 1:
        same = same[torch.tensor(ends)]
    return bool(same.all())


def _same(text: Tensor, made: Tensor) -> Tensor:
    """Which tokens are equal but for rounding."""
    return (text - made).norm(dim=1) <= TOLERANCE * made.norm(dim=1)


def _is_like(text: Tensor, made: Tensor, own: Tensor, words: Words) -> bool:
    """Whether tokens resemble those at their own places most."""
    middle = made[own].mean(0)
    made = normalize(made[own] - middle, dim=1)
    places, weighs = own.nonzero().flatten(), torch.tensor(words.weights)[own] != 1
    alike = normalize(text - middle, dim=1) @ made.T
    here = alike[own].diagonal() + 0.05  # a word may stand there twice
    most, at = alike.max(0)
    # Of each token how far it has moved; a word before it moves its neighbours as far.
    moved = torch.where(here < most, at - places, 0)
    together = moved[1:] == moved[:-1]
    together = pad(together, (0, 1)) | pad(together, (1, 0))
    is_moved = bool((weighs & together & (moved != 0)).any())
    return not is_moved and bool((here >= alike[own].amax(1)).float().mean() >= 0.3)
