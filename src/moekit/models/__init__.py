"""Models: one decoder, the rows of architectures it reads and writes, weights and tokenizers."""

from moekit.models.archs import ARCHS, Arch, read_config, write_config
from moekit.models.cache import KVCache
from moekit.models.decoder import Decoder, DecoderOutput, Features
from moekit.models.gguf_file import GGUFFile
from moekit.models.safetensors_file import SafetensorsFile, write_safetensors
from moekit.models.tokenizer import TextStream, Tokenizer, load_tokenizer
from moekit.models.weights import load_decoder, save_decoder

__all__ = [
    "ARCHS",
    "Arch",
    "Decoder",
    "DecoderOutput",
    "Features",
    "GGUFFile",
    "KVCache",
    "SafetensorsFile",
    "TextStream",
    "Tokenizer",
    "load_decoder",
    "load_tokenizer",
    "read_config",
    "save_decoder",
    "write_config",
    "write_safetensors",
]
