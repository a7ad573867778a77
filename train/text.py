"""The default model's tokenizer and text encoder."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

#: Captions are a few words; CLIP's 77 tokens would mostly be padding.
MAX_TOKENS = 16
VOCABULARY_SIZE = 1536


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Learn CLIP's byte pairs on the captions; the order of the captions does not matter."""
    shell = CLIPTokenizer()
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = shell.backend_tokenizer.normalizer
    learner.pre_tokenizer = shell.backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        end_of_word_suffix="</w>",
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[shell.bos_token, shell.eos_token],
        show_progress=False,
    )
    learner.train_from_iterator(sorted(captions), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build an untrained CLIPTextModel for this tokenizer: [B, 16] ids -> [B, 16, 128]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
