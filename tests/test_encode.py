"""Encoding: every image and text once, in order, and the same bits whoever shares the batches."""

import threading

import numpy as np
import pytest
import torch
from helpers import noise, tiny_encoder
from processes import on_ranks

from indiclip.evals.encode import ALONE, Ranks, cut_texts, encode_images, encode_texts
from indiclip.evals.models.embedder import EncoderEmbedder
from indiclip.images import UnreadableSample

SIZES = [(24, 16), (16, 40), (32, 32), (8, 24)]
BROKEN = (0, 6, 7, 8, 20)  # with batches of 3: one of a batch, a whole batch, one of the last
VIEWS = ["16", "4-square"]


class Pictures:
    """23 pictures of several sizes, some of which are broken; counts what is asked for."""

    def __init__(self, broken=BROKEN):
        self.broken, self.asked = broken, []

    def __len__(self):
        return 23

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise UnreadableSample(f"{index}.jpg", "broken")
        return noise(*SIZES[index % 4], seed=index)


class Counting(EncoderEmbedder):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__(tiny_encoder(), "tiny")
        self.texts, self.images = [], 0

    def embed_texts(self, texts):
        self.texts += texts
        return super().embed_texts(texts)

    def embed_images(self, batch):
        found = super().embed_images(batch)
        self.images += len(found)
        return found


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the ranks of `on_ranks`: with another number of threads a matrix product rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_threads(size, work):
    """What `work(ranks)` gives on each of some ranks, which are threads and meet wherever they gather."""
    meet, given, answers = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def run(rank):
        def gather(value):
            given[rank] = value
            meet.wait()
            values = list(given)
            meet.wait()  # nobody gives the next before all have taken these
            return values

        try:
            answers[rank] = work(Ranks(rank, size, gather))
        except BaseException:
            meet.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def encode(ranks=ALONE, pictures=None, embedder=None, batch_size=3, num_workers=0, progress=None):
    embedder = embedder or Counting()
    images = pictures or Pictures()
    return encode_images(embedder, images, embedder.views(VIEWS), batch_size, num_workers, ranks, progress)


@pytest.fixture(scope="module")
def alone():
    return encode()


def assert_same_bits(found, expected):
    assert list(found[0]) == VIEWS
    for view in VIEWS:
        assert torch.equal(found[0][view].nan_to_num(9), expected[0][view].nan_to_num(9))
    assert list(found[1].items()) == list(expected[1].items())
    assert found[2] == expected[2]


def test_rows_are_in_the_order_of_the_images_and_those_of_broken_ones_nan(alone):
    """The oracle encodes each image by itself; a batch rounds otherwise, by less than 1e-5."""
    images, unreadable, contents = alone
    embedder, pictures = Counting(), Pictures(())
    assert unreadable == {index: f"{index}.jpg: broken" for index in BROKEN}
    assert [index for index, digest in enumerate(contents) if not digest] == list(BROKEN)
    assert len(set(contents)) == 24 - len(BROKEN)  # no two pictures are alike
    for view in embedder.views(VIEWS):
        assert images[view.name].shape == (23, 64)
        assert images[view.name].dtype == torch.float32
        for index, row in enumerate(images[view.name]):
            if index in BROKEN:
                assert row.isnan().all()
                continue
            expected = embedder.embed_images(embedder.collate([embedder.prepare(pictures[index], view)]))[0]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
            assert row.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("size", "batch_size"), [(2, 3), (3, 3), (3, 4), (3, 20)])
def test_ranks_share_whole_batches_and_all_have_the_same_bits(size, batch_size):
    """23 images: batches of 3 give 8, of 4 give 6, of 20 give 2, so that ranks have unequal shares, or none."""
    pictures = [Pictures() for _ in range(size)]
    embedders = [Counting() for _ in range(size)]
    done = [[] for _ in range(size)]
    found = in_threads(
        size,
        lambda ranks: encode(
            ranks, pictures[ranks.rank], embedders[ranks.rank], batch_size, progress=done[ranks.rank].append
        ),
    )
    expected = encode(batch_size=batch_size)
    for one in found:
        assert_same_bits(one, expected)
    assert sorted(index for one in pictures for index in one.asked) == list(range(23))
    assert sum(one.images for one in embedders) == len(VIEWS) * (23 - len(BROKEN))
    assert sum(map(sum, done)) == 23


def test_processes_that_gather_over_gloo(alone, tmp_path):
    def gather(value):
        values = [None, None]
        torch.distributed.all_gather_object(values, value)
        return values

    def work(rank):
        images, unreadable, contents = encode(Ranks(rank, 2, gather))
        texts = encode_texts(Counting(), ["dosa", "idli"], Ranks(rank, 2, gather))
        of_texts = {k: x.numpy() for k, x in texts.items()}
        return {view: x.numpy() for view, x in images.items()}, unreadable, contents, of_texts

    texts = encode_texts(Counting(), ["dosa", "idli"])
    for images, unreadable, contents, of_texts in on_ranks(2, work, tmp_path):
        assert_same_bits(({view: torch.tensor(x) for view, x in images.items()}, unreadable, contents), alone)
        assert all(np.array_equal(of_texts[text], texts[text].numpy()) for text in texts)


def test_loader_processes_change_no_bit(alone):
    assert_same_bits(encode(num_workers=2), alone)


def test_broken_images_change_their_neighbours_by_rounding_only(alone):
    whole = encode(pictures=Pictures(()))
    kept = np.setdiff1d(np.arange(23), BROKEN)
    for view in VIEWS:
        torch.testing.assert_close(whole[0][view][kept], alone[0][view][kept], atol=1e-5, rtol=0)
    assert whole[1] == {}


def test_nothing_but_broken_images():
    images, unreadable, contents = encode(pictures=Pictures(range(23)))
    assert all(x.isnan().all() and x.shape == (23, 64) for x in images.values())
    assert len(unreadable) == 23
    assert set(contents) == {""}


def test_no_images():
    embedder = Counting()
    images, unreadable, contents = encode_images(embedder, [], embedder.views(VIEWS))
    assert [x.shape for x in images.values()] == [(0, 64), (0, 64)]
    assert (unreadable, contents) == ({}, [])


def test_an_error_that_is_no_broken_image_is_not_swallowed():
    class Gone(Pictures):
        def __getitem__(self, index):
            raise OSError(24, "too many open files")

    with pytest.raises(OSError, match="too many open files"):
        encode(pictures=Gone())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_text_is_encoded_once(size, monkeypatch):
    """The oracle encodes each text by itself."""
    monkeypatch.setattr("indiclip.evals.encode._TEXTS", 4)
    texts = [f"{'x' * (i % 5)} dosa {i % 13}" for i in range(60)] + ["मसाला डोसा", "a"]
    embedders = [Counting() for _ in range(size)]
    found = in_threads(size, lambda ranks: encode_texts(embedders[ranks.rank], texts, ranks))
    alone, one_by_one = encode_texts(Counting(), texts), Counting()
    asked = [text for embedder in embedders for text in embedder.texts]
    assert sorted(asked) == sorted(set(texts))
    for of_rank in found:
        assert of_rank.keys() == set(texts)
        for text, row in of_rank.items():
            assert torch.equal(row, alone[text])
            torch.testing.assert_close(row, one_by_one.embed_texts([text])[0], atol=1e-5, rtol=0)


def test_no_texts():
    assert encode_texts(Counting(), []) == {}


@pytest.mark.parametrize("context", [12, 40])
def test_texts_are_cut_that_have_more_bytes_than_the_context_has_room_for(context):
    """Of bytes it is known: all but the start and the end token. Of them is also the one that just fits."""
    encoder = tiny_encoder()
    encoder.text.tokenizer.context_length = context
    texts = ["a" * n for n in range(1, 60)] + ["डोसा " * n for n in (1, 2, 3, 4, 5)]
    expected = {text for text in texts if len(text.encode()) > context - 2}
    assert cut_texts(EncoderEmbedder(encoder, "tiny"), texts) == expected
