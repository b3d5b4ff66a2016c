"""Text to token ids and back, for every tokenizer a LLaMA checkpoint comes with.

`load_tokenizer` decides which reader a directory needs; the readers import their third-party
libraries only when used, so importing this package is cheap. It knows nothing of models, engines
or generation settings.
"""

from puna.tokenizer.config import TOKENIZER_FILES
from puna.tokenizer.detokenize import Detokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tokenizer import Tokenizer

__all__ = ["TOKENIZER_FILES", "Detokenizer", "Tokenizer", "load_tokenizer"]
