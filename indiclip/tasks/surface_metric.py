"""How well the surfaces of people fit their annotated points and masks.

Shape letters: see `indiclip.types`; Q people of an image, S points of it, L thresholds, h w cells of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.head import ListMetric, Prediction
from indiclip.tasks.surface_charts import coarse_targets, points_of, read_cells

KAPPA = 0.255  # of the geodesic point similarity (Güler et al., CVPR 2018, section 3)


class SurfaceMetric(ListMetric):
    """How well surfaces fit the annotated points, with the ground-truth boxes: one prediction per annotated person.

    The predicted part, U and V at a point are those of the window's cell that it lies in: what is scored is what
    `predict` hands out. `compute` gives
        part_accuracy: share of the points whose part is right; a point off the predicted person is wrong.
        uv_error: mean distance in (U, V) over the points whose part is right; 1 where there is none.
        mask_iou: mean over people of the overlap of predicted and annotated mask, cell by cell of the window.
        uv_gps: average precision over the thresholds 0.50, 0.55, ... 0.95, and uv_gps_50, uv_gps_75 at one, of the
            similarity mean_points exp(-d^2 / (2 kappa^2)) of a person; d is the distance in (U, V), and infinite where
            the part is wrong. GPS proper takes the distance along the body's surface, from tables that the user would
            have to download, so that numbers here are not comparable to published ones. People without points are
            left out. Precision is interpolated at 101 recalls, as COCO's evaluation does.
    """

    def update(self, prediction: Prediction, target: Prediction) -> None:
        """Add an image: one dict of `DensePose.predict` and the image's targets, the same people in both."""
        boxes_Q4 = prediction["boxes_xyxy"]
        xy_S2, person_S, part_S, uv_S2 = points_of(target, boxes_Q4.device)
        found_S, found_uv_S2 = read_cells(prediction, xy_S2, person_S)
        right_S = found_S == part_S
        distance_S = (found_uv_S2 - uv_S2).norm(dim=1)
        similarity_S = right_S * torch.exp(-(distance_S**2) / (2 * KAPPA**2))
        points_Q = torch.bincount(person_S, minlength=len(boxes_Q4))
        gps_Q = torch.zeros_like(boxes_Q4[:, 0]).index_add(0, person_S, similarity_S.to(boxes_Q4)) / points_Q.clamp(
            min=1
        )
        iou_Q = _mask_iou(prediction["part"], target.get("dp_masks"), boxes_Q4)
        scored_Q = points_Q > 0
        self.add(right_S, distance_S, iou_Q, gps_Q[scored_Q], prediction["scores"][scored_Q])

    def compute(self) -> dict[str, Tensor]:
        columns = zip(*self.rows_of_all_ranks(), strict=True)
        right_S, distance_S, iou_Q, gps_Q, scores_Q = map(torch.cat, columns)
        precision_L = average_precision(gps_Q, scores_Q, torch.arange(50, 100, 5) / 100)
        return {
            "part_accuracy": right_S.sum() / max(len(right_S), 1),
            "uv_error": distance_S[right_S].mean() if right_S.any() else torch.tensor(1.0),
            "mask_iou": iou_Q.sum() / max(len(iou_Q), 1),
            "uv_gps": precision_L.mean(),
            "uv_gps_50": precision_L[0],
            "uv_gps_75": precision_L[5],
        }


def average_precision(similarity_Q: Tensor, scores_Q: Tensor, thresholds_L: Tensor) -> Tensor:
    """AP of Q predictions for Q people at each threshold, (L,) on the CPU, as COCO computes it.

    Ranked by score, a prediction is right where its similarity reaches the threshold. The precision at a recall is the
    best at that recall or any higher one; their mean is over the recalls 0, 0.01, ... 1.
    """
    Q = len(similarity_Q)
    if Q == 0:
        return torch.zeros(len(thresholds_L))
    ranked_Q = similarity_Q[scores_Q.argsort(descending=True, stable=True)].cpu().double()
    # A hair below, so that a similarity of 0.55 in float32 reaches 0.55.
    right_LQ = (ranked_Q >= thresholds_L.double()[:, None] - 1e-6).double().cumsum(1)
    precision_LQ = right_LQ / torch.arange(1, Q + 1)
    best_LQ = precision_LQ.flip(1).cummax(1).values.flip(1)
    recalls_LN = (torch.arange(101).double() / 100 - 1e-9).repeat(len(thresholds_L), 1)
    place_LN = torch.searchsorted(right_LQ / Q, recalls_LN)
    return F.pad(best_LQ, (0, 1)).gather(1, place_LN).mean(1).float()  # a recall never reached has precision 0


def _mask_iou(part_Qhw: Tensor, masks_QHW: Tensor | None, boxes_Q4: Tensor) -> Tensor:
    """Overlap of each person's predicted and annotated mask, (Q,), or (0,) without masks."""
    if masks_QHW is None or not len(boxes_Q4):
        return boxes_Q4.new_zeros(0)
    size_Q2 = torch.tensor([masks_QHW.shape[1:]] * len(boxes_Q4), device=boxes_Q4.device)
    truth_Qhw = coarse_targets(masks_QHW, boxes_Q4, part_Qhw.shape[-1], size_Q2) > 0
    both, either = truth_Qhw & (part_Qhw > 0), truth_Qhw | (part_Qhw > 0)
    return both.sum((1, 2)) / either.sum((1, 2)).clamp(min=1)
