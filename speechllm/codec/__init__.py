"""Neural codecs behind one contract: waveform in, discrete codes out, and back."""

from speechllm.codec.base import Codec
from speechllm.codec.encodec import EncodecCodec, EncodecConfig
from speechllm.codec.huggingface import HuggingFaceCodec, HuggingFaceConfig
from speechllm.codec.load import copy_codec, load_codec, save_codec
from speechllm.codec.speech import SpeechCodec, SpeechCodecConfig

__all__ = [
    "Codec",
    "EncodecCodec",
    "EncodecConfig",
    "HuggingFaceCodec",
    "HuggingFaceConfig",
    "SpeechCodec",
    "SpeechCodecConfig",
    "copy_codec",
    "load_codec",
    "save_codec",
]
