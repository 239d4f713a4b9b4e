import pytest
import tiny_models


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A directory with a tiny Llama and no tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    return str(tiny_models.write_checkpoint(directory, tiny_models.CASES["llama_gqa_llama3"]))


@pytest.fixture(scope="session")
def tiny_options(tiny_model):
    """Options of an engine that compiles quickly and only what it needs."""
    return {
        "model": tiny_model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "num_blocks": 80,
        "compilation": "lazy",
    }
