"""Concepts in a model's own weights compute what diffusers computes with them beside it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from safetensors.torch import save_file

from encache.errors import CheckpointError
from encache.model.checkpoint import find_checkpoint
from encache.model.concept import find_concept
from encache.model.loading import load_pipeline
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import TEXT_WIDTH, make_pipeline, make_xl_pipeline


def vectors(number, width, seed=0):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) * 50


@pytest.fixture
def toy(tmp_path):
    """A token of three embeddings, as diffusers' textual_inversion.py writes it."""
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<toy>": vectors(3, TEXT_WIDTH)}, path)
    return path


@pytest.fixture
def custom(tmp_path):
    """Weights as diffusers' train_custom_diffusion.py writes them, and the UNet that has them."""
    unet = make_pipeline().unet
    torch.manual_seed(3)
    processors = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        crossing = name.endswith("attn2.processor")
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv=crossing,
            train_q_out=crossing,
            hidden_size=attention.to_q.in_features,
            cross_attention_dim=attention.to_k.in_features if crossing else None,
        )
    unet.set_attn_processor(processors)
    unet.save_attn_procs(tmp_path / "cat", safe_serialization=True)
    (path,) = (tmp_path / "cat").glob("*.safetensors")
    return path, unet


def opened(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def embeds(pipeline, prompt):
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


@pytest.mark.parametrize("token", ["", "<cat>"])
def test_a_token_means_what_it_means_in_diffusers(model_folder, toy, token):
    wanted = opened(model_folder)
    wanted.load_textual_inversion(str(toy), token=token or None)
    concept = f"{toy}:{token}" if token else str(toy)
    ours = load_pipeline(find_checkpoint(model_folder, concepts=[concept]))
    prompt = f"a {token or '<toy>'} apple"
    torch.testing.assert_close(embeds(ours, prompt), embeds(wanted, prompt))
    plain = embeds(opened(model_folder), prompt)
    assert (embeds(ours, prompt) - plain).norm() > 0.1 * plain.norm()


def test_a_token_goes_into_engines(model_folder, toy, tmp_path):
    wanted = opened(model_folder)
    wanted.load_textual_inversion(str(toy))
    ours = EncachePipeline.from_pretrained(model_folder, concepts=[str(toy)], engine_dir=tmp_path)
    found = ours.texts(["a <toy>"])["text"]
    torch.testing.assert_close(found, embeds(wanted, "a <toy>"), rtol=1e-3, atol=1e-3)


def test_a_token_of_xl_has_two_embeddings(tmp_path):
    make_xl_pipeline().save_pretrained(tmp_path / "xl")
    path = tmp_path / "toy.safetensors"
    save_file({"clip_l": vectors(1, TEXT_WIDTH), "clip_g": vectors(1, 24, 1)}, path)
    ours = load_pipeline(find_checkpoint(tmp_path / "xl", concepts=[str(path)]))
    for tokenizer, encoder, expected in (
        (ours.tokenizer, ours.text_encoder, vectors(1, TEXT_WIDTH)),
        (ours.tokenizer_2, ours.text_encoder_2, vectors(1, 24, 1)),
    ):
        place = tokenizer.convert_tokens_to_ids("toy")
        torch.testing.assert_close(encoder.get_input_embeddings().weight[place][None], expected)


@torch.no_grad()
def test_custom_diffusion_equals_its_processors(model_folder, custom):
    path, unet = custom
    ours = load_pipeline(find_checkpoint(model_folder, concepts=[str(path)])).unet
    assert not any("Custom" in type(one).__name__ for one in ours.attn_processors.values())
    inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, TEXT_WIDTH)
    torch.testing.assert_close(ours(*inputs).sample, unet(*inputs).sample)
    unet.set_attn_processor(AttnProcessor())
    assert (ours(*inputs).sample - unet(*inputs).sample).abs().max() > 1e-3


def test_concepts_are_part_of_a_checkpoint(model_folder, toy, custom):
    plain, one, other, both = (
        find_checkpoint(model_folder, concepts=concepts).fingerprint
        for concepts in ([], [str(toy)], [f"{toy}:<cat>"], [str(custom[0]), str(toy)])
    )
    assert len({plain, one, other, both}) == 4


def test_what_does_not_fit(model_folder, tmp_path, custom):
    wide = tmp_path / "wide.safetensors"
    save_file({"<toy>": vectors(1, 768)}, wide)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_pipeline(find_checkpoint(model_folder, concepts=[str(wide)]))
    other = tmp_path / "other.safetensors"
    name = "mid_block.attentions.9.attn2.processor.to_k_custom_diffusion.weight"
    save_file({name: torch.zeros(2, 2)}, other)
    with pytest.raises(CheckpointError, match=r"no place for mid_block.attentions.9.attn2.to_k"):
        load_pipeline(find_checkpoint(model_folder, concepts=[str(other)]))
    with pytest.raises(CheckpointError, match="holds no token"):
        find_concept(f"{custom[0]}:<cat>")


def test_what_is_no_concept(tmp_path):
    with pytest.raises(CheckpointError, match="no file of a concept"):
        find_concept(str(tmp_path / "none.safetensors"))
    two = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, two)
    with pytest.raises(CheckpointError, match="neither of textual inversion nor"):
        find_concept(str(two))
    pickle = tmp_path / "learned_embeds.bin"
    torch.save({"<toy>": torch.zeros(1, 2)}, pickle)
    with pytest.raises(CheckpointError, match="pickle"):
        find_concept(str(pickle))
