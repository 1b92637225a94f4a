"""The distance between a student's and its teachers' softmax over similarities, both ways, exact across ranks.

MobileCLIP (Vasu, Pouransari, Faghri, Vemulapalli, Tuzel, CVPR 2024, arXiv:2311.17049, section 3, equation 2): for a
batch of image-text pairs each teacher gives, at its own scale, a distribution over the texts for each image, and one
over the images for each text. The loss is the mean over teachers and rows of the Kullback-Leibler divergence from it to
the student's, at the student's scale. Cross entropy is linear in the target, so that the teachers are averaged after
their softmax and the student is compared once with the mean.

As in `indiclip.losses`, what a rank returns is the mean over its own pairs; averaged over the ranks, values and
gradients are those of one process with the whole batch. Gradients are computed along with the loss, some rows at a
time, so that no logits wait for the backward pass.

Shape letters: B pairs on this rank, W ranks, G = W * B, R rows of a chunk, T teachers, E embedding length (each side
and teacher its own; teachers shorter than the longest end in zeros).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.autograd import with_gradients
from indiclip.chunked_cross_entropy import rows_of_chunk
from indiclip.distributed import all_gather, rank_and_world, reduce_scatter
from indiclip.logit_chunks import ScaledPrefixes
from indiclip.losses import PairLoss


class DistillationLoss(PairLoss):
    """See above. The student's factor on the cosines is learned, and starts at CLIP's 1 / 0.07."""

    paper_logit_scale = 1 / 0.07
    _teachers: tuple[int, ...] = (1, 1)  # how many, and the longest length; of the newest batch

    def forward(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        teacher_image_BTE: Tensor,
        teacher_text_BTE: Tensor,
        teacher_scale_T: Tensor,
    ) -> Tensor:
        """Compares this rank's pairs with those of all ranks.

        Args:
            image_BE: The student's embeddings of the images, of any norm: each prefix is L2-normalised here.
            text_BE: Those of their texts, likewise.
            teacher_image_BTE: Each teacher's embeddings of the images, of any norm.
            teacher_text_BTE: Those of their texts.
            teacher_scale_T: Each teacher's factor on the cosines.

        Returns:
            Scalar >= 0, float64 if an embedding is, else float32 (also under autocast).
        """
        dtype = torch.float64 if torch.float64 in (image_BE.dtype, text_BE.dtype) else torch.float32
        self._teachers = tuple(teacher_image_BTE.shape[1:])
        with torch.autocast(image_BE.device.type, enabled=False):
            inputs = [image_BE, text_BE, self._scale(dtype)]
            wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
            with torch.no_grad():
                scale_T = teacher_scale_T.to(dtype)
                teacher = [_of_all_ranks(x, dtype) for x in (teacher_image_BTE, teacher_text_BTE)]
                student = [_of_all_ranks(x, dtype) for x in (image_BE, text_BE)]
                loss, gradients = self._walk(student, inputs[2].detach(), teacher, scale_T)
            if not wanted:
                return loss
            *of_all, of_scale = gradients
            own = [reduce_scatter(gradient).to(x.dtype) for gradient, x in zip(of_all, inputs, strict=False)]
            return with_gradients(loss, [*own, of_scale], inputs)

    def example(self, num_pairs: int, embed_dim: int) -> dict[str, Tensor]:
        """With as many teachers, of the same length, as the newest batch had."""
        image_BE, text_BE = (torch.zeros(num_pairs, embed_dim, requires_grad=True) for _ in range(2))
        image_BTE, text_BTE = (torch.zeros(num_pairs, *self._teachers) for _ in range(2))
        scale_T = torch.ones(self._teachers[0])
        return {
            **{"image_BE": image_BE, "text_BE": text_BE, "teacher_image_BTE": image_BTE},
            **{"teacher_text_BTE": text_BTE, "teacher_scale_T": scale_T},
        }

    def _walk(
        self, student: list[Tensor], scale: Tensor, teacher: list[Tensor], scale_T: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean over this rank's pairs, and its gradients with respect to the student's embeddings and scale.

        Args:
            student: Images and texts of all ranks, (G, E) each.
            scale: (1,).
            teacher: (G, T, E) each.
            scale_T: Of the teachers.
        """
        rank, world = rank_and_world()
        num_pairs = len(student[0]) // world
        lengths, weights = zip(*self._weighted_lengths(student[0].shape[1]), strict=True)
        image = ScaledPrefixes(student[0], lengths, scale.dtype, True, scale)
        text = ScaledPrefixes(student[1], lengths, scale.dtype, True)
        for gradient in (*image.gradients, *text.gradients):
            gradient.zero_()
        teacher = [F.normalize(x_GTE, dim=2) for x_GTE in teacher]
        loss = scale.new_zeros(())
        step = rows_of_chunk(len(student[0]), scale.device.type)
        for first in range(0, num_pairs, step):
            rows = slice(rank * num_pairs + first, rank * num_pairs + min(first + step, num_pairs))
            for own, other, (x_GTE, y_GTE) in ((image, text, teacher), (text, image, teacher[::-1])):
                target_RG, entropy = _target(x_GTE[rows], y_GTE, scale_T)
                loss -= entropy
                for index, weight in enumerate(weights):
                    x_RE, y_GE = own.scaled[index][rows], other.scaled[index]
                    log_probs_RG = torch.mm(x_RE, y_GE.T).log_softmax(1)
                    loss -= weight * (target_RG * log_probs_RG).sum()
                    gradient_RG = log_probs_RG.exp_().sub_(target_RG)
                    own.gradients[index][rows].addmm_(gradient_RG, y_GE)
                    other.gradients[index].addmm_(gradient_RG.T, x_RE)
        share = 0.5 / num_pairs  # of a row in the mean
        shares = [weight * share for weight in weights]
        return loss * share, [image.pull_back(shares), text.pull_back(shares), image.of_norm(shares)]


def _of_all_ranks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of all ranks, rank after rank, without gradients."""
    return all_gather(x.detach()).flatten(0, 1).to(dtype)


def _target(x_RTE: Tensor, y_GTE: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the teachers' distributions (R, G), and the sum over rows of the mean of their entropies."""
    target_RG, entropy = x_RTE.new_zeros(len(x_RTE), len(y_GTE)), x_RTE.new_zeros(())
    for number, scale in enumerate(scale_T.unbind()):
        probs_RG = torch.mm(x_RTE[:, number] * scale, y_GTE[:, number].T).softmax(1)
        target_RG += probs_RG
        entropy += torch.special.entr(probs_RG).sum()
    return target_RG / len(scale_T), entropy / len(scale_T)
