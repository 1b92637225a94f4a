"""The codebook against Lloyd's k-means, the averages' formula by hand, and one process against two."""

import pytest
import torch
from processes import on_ranks

from indiclip.tasks.patch_codebook import CANDIDATES, Codebook, PatchCodebook


def codebook(size=3, decay=0.0, width=2, **options):
    return PatchCodebook(Codebook(size, decay, **options), torch.full((width,), 100.0), torch.full((width,), 50.0))


def learn(book, patches_KP, progress=0.1, made=1.0):
    """A step on these patches, four of an image."""
    book.see(book.sums(patches_KP, book(patches_KP))[None], patches_KP.unflatten(0, (-1, CANDIDATES)))
    book.update(progress, torch.tensor(made))


def clusters(seed=0, number=40):
    torch.manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    return (centres[torch.arange(number) % 3] + 0.1 * torch.randn(number, 2)), centres


def test_without_memory_a_step_is_one_of_lloyds():
    book, (patches_KP, _) = codebook(), clusters()
    learn(book, patches_KP)
    assert book.is_learned
    torch.testing.assert_close(book.codes_CP, patches_KP[[0, 4, 8]])  # the first patch of each of three images
    before = book.codes_CP
    nearest_K = torch.cdist(patches_KP, before).argmin(1)
    assert torch.equal(book(patches_KP), nearest_K)
    learn(book, patches_KP)
    means = torch.stack([patches_KP[nearest_K == code].mean(0) for code in range(3)])
    torch.testing.assert_close(book.codes_CP, means)


def test_codes_find_clusters():
    book, (_, centres) = codebook(decay=0.5), clusters()
    for step in range(12):
        learn(book, clusters(step)[0])
    distances = torch.cdist(centres, book.codes_CP)
    assert distances.min(1).values.max() < 0.1
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2]


def test_averages_by_hand_and_dead_codes():
    book = codebook(size=2, decay=0.75)
    patches_KP = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0], [10.0, 0.0]])
    with torch.no_grad():
        book.sums_CP.copy_(torch.tensor([[2.0, 0.0], [-500.0, 0.0]]))
        book.counts_C.copy_(torch.tensor([4.0, 0.01]))  # codes (0.5, 0) and (-50000, 0), which nothing is near to
        book.steps += 1
    learn(book, patches_KP)
    # 0.75 * 4 + 0.25 * 4 patches; 0.75 * 2 + 0.25 * 20.
    assert book.counts_C[0] == 4
    assert book.sums_CP[0].tolist() == [6.5, 0.0]
    assert book.codes_CP[1].tolist() == [0.0, 0.0]  # drawn anew: the first of the candidates
    mean = (4 + 0.0075) / 2
    assert book.counts_C[1].item() == pytest.approx(0.06 * mean)


def test_codes_stay_after_their_time_and_are_pixels():
    book = codebook(until=0.5)
    learn(book, clusters()[0], progress=0.5)
    before = book.codes_CP
    learn(book, clusters(1)[0], progress=0.51)
    assert torch.equal(book.codes_CP, before)
    assert book.normalise(torch.tensor([[150, 0]], dtype=torch.uint8)).tolist() == [[1, -2]]
    with torch.no_grad():
        book.sums_CP.copy_(torch.tensor([[1.0, -2.0], [9.0, 0.0], [0.1, 0.0]]))
        book.counts_C.fill_(1)
    assert book.pixels(torch.tensor([0, 1, 2])).tolist() == [[150, 0], [255, 100], [105, 100]]


def test_a_head_that_begins_after_the_time_of_the_codes_gets_the_first_ones():
    book = codebook(until=0.5)
    learn(book, clusters()[0], progress=0.8)
    assert book.is_learned
    before = book.codes_CP
    learn(book, clusters(1)[0], progress=0.9)
    assert torch.equal(book.codes_CP, before)


def test_two_ranks_learn_the_codes_of_one(tmp_path):
    patches = [clusters(step, 48)[0].double() for step in range(3)]

    def work(rank):
        book = codebook(size=5, decay=0.9).double()
        for patches_KP in patches:  # images are dealt to the ranks in turn
            images = patches_KP.unflatten(0, (-1, CANDIDATES))
            own = images if rank is None else images[rank::2]
            learn(book, own.flatten(0, 1))
        return book.codes_CP.tolist()

    alone = work(None)
    for found in on_ranks(2, work, tmp_path):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=0, atol=1e-12)
