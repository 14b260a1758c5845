"""The tokenizers that the tests of this directory share."""

import pytest
from tokenizer_cases import LLAMA, train_backend, write_tokenizer

from flexjax.io.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def backend():
    return train_backend()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, backend):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), backend)


@pytest.fixture(scope="session")
def llama_template_dir(tmp_path_factory, backend):
    return write_tokenizer(tmp_path_factory.mktemp("llama"), backend, LLAMA)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return Tokenizer.from_pretrained(tokenizer_dir)
