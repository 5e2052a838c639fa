"""What users can drag onto the canvas."""

from .check import TACAPromptCheck
from .find import TACAFindSetting
from .lora import LoadTACALoRA, TACATrainingWindow
from .patch import TACAOptions, TACAPatchModel, TACAScheduleNode
from .preview import TACASchedulePreview
from .report import TACAAttentionReport, TACAShowAttention, TACAWatchAttention
from .score import TACAAlignmentScore
from .sweep import TACAContactSheet, TACASweep
from .trial import TACATrial
from .words import TACATextEncode, TACAWeighWords, TACAWordSweep

NODES = [
    TACAPatchModel,
    TACAScheduleNode,
    TACAOptions,
    TACATextEncode,
    TACAWeighWords,
    TACAWordSweep,
    TACASchedulePreview,
    TACAAttentionReport,
    TACAWatchAttention,
    TACAShowAttention,
    TACASweep,
    TACAContactSheet,
    TACAAlignmentScore,
    TACAPromptCheck,
    TACATrial,
    TACAFindSetting,
    LoadTACALoRA,
    TACATrainingWindow,
]
