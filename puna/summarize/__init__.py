"""CNN/DailyMail summaries of an engine, and of transformers on the same token ids, with ROUGE.

`load_samples` finds the articles, `encode_prompts` makes token ids of them, `summarize_with_llm`
and `summarize_with_transformers` answer the same ones, `rouge_scores` compares the answers with the
highlights. Nothing here prints.
"""

from puna.summarize.dataset import Dataset, Sample, load_samples
from puna.summarize.prompts import encode_prompts, find_tokenizer, prompt_text
from puna.summarize.rouge import RougeScores, rouge_scores
from puna.summarize.systems import SummaryOptions, SystemResult, summarize_with_llm
from puna.summarize.transformers_model import summarize_with_transformers

__all__ = [
    "Dataset",
    "RougeScores",
    "Sample",
    "SummaryOptions",
    "SystemResult",
    "encode_prompts",
    "find_tokenizer",
    "load_samples",
    "prompt_text",
    "rouge_scores",
    "summarize_with_llm",
    "summarize_with_transformers",
]
