"""YOLACT's detector as object stream (4.2): the one of RDSNet-s.

Facts are those of the authors' code (github.com/dbolya/yolact), where the YOLACT paper leaves them open.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdsnet.device import mean_over_ranks, to_device, to_host
from rdsnet.model.layers import conv_norm_relu, initialise
from rdsnet.model.object_stream.dense import MAX_LOG_RATIO, Common, DenseStream, Lesson, Raw
from rdsnet.model.object_stream.learning import BACKGROUND, IGNORED, best_objects, flatten_levels, overlaps
from rdsnet.structures import Targets

CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2  # SSD's: deltas are divided by these, so that they are of the order of 1

Shapes = tuple[tuple[float, float], ...]


class YolactStream(DenseStream):
    """Priors in pixels of the input, one convolution that all branches and levels share, softmax, hard negatives.

    Args:
        common: what every stream is told.
        prior_sizes: side of the priors of each level, in input pixels.
        prior_ratios: width / height of the priors of a location; their area stays.
        positive_iou, negative_iou: priors at or above the first learn an object, below the second the background,
            those between learn nothing. Every object has one prior of its own in any case.
        crowd_iou: priors without an object that lie in a crowd by more than this share learn nothing.
        negative_ratio: hardest background priors that learn, for each positive one of the image.
    """

    background_rows = 1

    def __init__(
        self,
        common: Common,
        *,
        prior_sizes: Sequence[float],
        prior_ratios: Sequence[float],
        positive_iou: float,
        negative_iou: float,
        crowd_iou: float,
        negative_ratio: float,
    ) -> None:
        levels = len(common.strides)
        if len(prior_sizes) != levels:
            raise ValueError(f"expected {levels} prior_sizes, one a level, got {tuple(prior_sizes)}")
        kinds = len(prior_ratios)
        super().__init__(common, anchors_per_location=kinds)
        square = common.rules.square_priors
        self._shapes = tuple(prior_shapes((size,), prior_ratios, square=square) for size in prior_sizes)
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.crowd_iou, self.negative_ratio = crowd_iou, negative_ratio

        channels = common.channels

        def branch(numbers: int) -> nn.Conv2d:
            return initialise(nn.Conv2d(channels, numbers, 3, padding=1), nn.init.xavier_uniform_)

        self.shared = conv_norm_relu(channels, channels, common.norm, nn.init.xavier_uniform_)
        self.classify = branch(kinds * (self.background_rows + common.num_classes))
        self.regress = branch(kinds * 4)
        if common.representation is not None:
            initialise(self.represent, nn.init.xavier_uniform_)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Raw:
        features = [self.shared(x) for x in levels]
        return Raw(
            size=size,
            logits=[self.classify(x) for x in features],
            deltas=[self.regress(x) for x in features],
            features=features if self.representation is not None else [],
        )

    def terms(self, raw: Raw, lesson: Lesson) -> dict[str, Tensor]:
        """Cross entropy "cls" with the hardest background and smooth L1 "box", over the number of positives."""
        logits = flatten_levels(raw.logits, 1 + self.num_classes)  # (B, R, 1 + C)
        deltas = flatten_levels(raw.deltas, 4)[lesson.places]
        divisor = mean_over_ranks(logits.new_full((), len(lesson.labels))).clamp(min=1)
        wanted = torch.where(lesson.assigned == IGNORED, IGNORED, 0)
        wanted[lesson.places] = lesson.labels + 1  # class 0 is the background
        classification = classification_loss(logits, wanted, self.negative_ratio)
        priors = torch.cat(self.priors(raw))[lesson.positives.anchor]
        regression = F.smooth_l1_loss(deltas, encode(priors, lesson.boxes), reduction="sum")
        return {"cls": classification / divisor, "box": regression / divisor}

    def priors(self, raw: Raw) -> list[Tensor]:
        """(h * w * A, 4) priors of each level: centre x, centre y, width and height in input pixels."""
        device = raw.logits[0].device
        return [
            place_priors(shapes, map_size, raw.size, device)
            for shapes, map_size in zip(self._shapes, raw.map_sizes, strict=True)
        ]

    def assign(self, raw: Raw, targets: Targets) -> Tensor:
        device = targets.boxes.device
        levels = [corners(level.to(device)) for level in self.priors(raw)]
        first = [level[: self.anchors_per_location] for level in levels]  # those of the location at the top left
        steps = [(raw.size[0] / h, raw.size[1] / w) for h, w in raw.map_sizes]
        iou = overlaps(targets.boxes, first, raw.map_sizes, steps)
        priors = torch.cat(levels)
        valid = self.valid(raw.map_sizes, targets.image_size)
        assigned = torch.full((len(priors),), IGNORED, device=device)
        # without copying the large tensor where that can be
        learns = slice(None) if valid.all() else to_device(valid.nonzero()[:, 0], device)
        assigned[learns] = assign_priors(iou[:, learns], self.positive_iou, self.negative_iou)
        in_crowd = share_inside(priors, targets.crowd_boxes) > self.crowd_iou
        return assigned.masked_fill_(in_crowd & (assigned < 0), IGNORED)

    def candidates(self, raw: Raw, image: int, level: int) -> tuple[Tensor, Tensor]:
        maps = raw.logits[level][image].float().view(self.anchors_per_location, 1 + self.num_classes, -1)
        scores = maps.softmax(dim=1)[:, 1:]  # (A, C, h * w)
        best = scores.amax(dim=1).t().flatten()
        # A GPU is waited for here, once a level: most priors are far below the threshold, and there are many
        index = (best > self.score_threshold).nonzero()[:, 0]
        if self.pre_nms is not None and len(index) > self.pre_nms:
            index = index[best[index].topk(self.pre_nms).indices]
        return index, scores[index % self.anchors_per_location, :, index // self.anchors_per_location]

    def decode(self, raw: Raw, image: int, level: int, index: Tensor) -> Tensor:
        return decode(self.priors(raw)[level][index], self.deltas(raw, image, level, index))


def prior_shapes(sizes: Sequence[float], ratios: Sequence[float], *, square: bool) -> Shapes:
    """Width and height in pixels of the priors of a location: the first size in every ratio, then the next.

    `square` sets heights to the widths: an old slip of YOLACT's that its weights were trained with.
    """
    shapes = []
    for size in sizes:
        for ratio in ratios:
            root = math.sqrt(ratio)
            shapes.append((size * root, size * root if square else size / root))
    return tuple(shapes)


@lru_cache(maxsize=32)
def place_priors(shapes: Shapes, map_size: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """(h * w * A, 4) float32 priors of a level, centred on the cells of a map that divides the input evenly.

    Args:
        shapes: width and height of the A priors of a location, in pixels.
        map_size: (h, w) of the level.
        size: (H, W) of the network input.

    Returns:
        centre x, centre y, width, height in input pixels; over row, column, then the shapes.
    """
    y, x = (
        (torch.arange(cells, dtype=torch.float64) + 0.5) * (pixels / cells)
        for cells, pixels in zip(map_size, size, strict=True)
    )
    h, w = map_size
    centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)[:, :, None].expand(h, w, len(shapes), 2)
    shape = torch.tensor(shapes, dtype=torch.float64).expand(h, w, len(shapes), 2)
    return to_device(torch.cat([centre, shape], dim=3).flatten(0, 2).float(), device)


def corners(boxes: Tensor) -> Tensor:
    """(K, 4) centre x, centre y, width, height -> x1, y1, x2, y2."""
    half = boxes[:, 2:] / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=1)


def encode(priors: Tensor, boxes: Tensor) -> Tensor:
    """SSD's code: (K, 4) deltas dx, dy, dw, dh that take priors (centre and size) to boxes (xyxy)."""
    size = boxes[:, 2:] - boxes[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) / 2 - priors[:, :2]) / priors[:, 2:]
    return torch.cat([shift / CENTRE_VARIANCE, (size / priors[:, 2:]).log() / SIZE_VARIANCE], dim=1)


def decode(priors: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode`; a box is at most 62.5 times its prior on each axis."""
    size = priors[:, 2:] * (deltas[:, 2:] * SIZE_VARIANCE).clamp(max=MAX_LOG_RATIO).exp()
    low = priors[:, :2] + deltas[:, :2] * CENTRE_VARIANCE * priors[:, 2:] - size / 2
    return torch.cat([low, low + size], dim=1)


def assign_priors(iou: Tensor, positive_iou: float, negative_iou: float) -> Tensor:
    """(R,) the object that each prior learns, BACKGROUND or IGNORED, from the (N, R) IoU.

    A prior takes the object it overlaps most. Then every object takes the one prior of `own_priors`, whatever their
    overlap.
    """
    if len(iou) == 0:
        return torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    assigned = best_objects(iou, positive_iou, negative_iou)
    objects, priors = own_priors(iou)
    assigned[priors] = objects
    return assigned


def own_priors(iou: Tensor) -> tuple[Tensor, Tensor]:
    """One prior for each object, from the (N, R) IoU: objects (K,) and their priors (K,), K = min(N, R).

    The largest IoU of all takes its object and prior out, then the largest of what is left, and so on; the lower
    index wins a tie.
    """
    count, total = iou.shape
    # None can need more than its `count` best priors. The bits of a positive float order as it does; beneath them
    # goes the index, as topk breaks ties in any way
    key = (iou.view(torch.int32).long() << 32) + torch.arange(total - 1, -1, -1, device=iou.device)
    index = key.topk(min(count, total), dim=1).indices
    choices, shares = (found.tolist() for found in to_host(index, iou.gather(1, index)))
    queue = [(-shares[i][0], i, 0) for i in range(count)]
    heapq.heapify(queue)
    owner: dict[int, int] = {}
    while queue:
        _, i, turn = heapq.heappop(queue)
        if choices[i][turn] not in owner:
            owner[choices[i][turn]] = i
        elif turn + 1 < len(choices[i]):
            heapq.heappush(queue, (-shares[i][turn + 1], i, turn + 1))
    pairs = to_device(torch.tensor([list(owner.values()), list(owner)]), iou.device)
    return pairs[0], pairs[1]


def share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """(K,) the largest share of each box's area that lies in one of the (M, 4) regions; all xyxy."""
    if len(regions) == 0:
        return boxes.new_zeros(len(boxes))
    low = torch.maximum(boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    overlap = (high - low).clamp(min=0).prod(dim=2).amax(dim=1)
    return overlap / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def classification_loss(logits: Tensor, wanted: Tensor, ratio: float) -> Tensor:
    """Sum of the cross entropy of the priors that learn an object and of `hard_negatives`.

    Args:
        logits: (B, R, 1 + C), background first.
        wanted: (B, R) int64, 0 for the background, 1..C for a class, or IGNORED.
        ratio: negatives for each positive prior.
    """
    rows = (wanted > 0) | hard_negatives(logits.detach(), wanted, ratio)
    index = rows.nonzero().unbind(1)
    return F.cross_entropy(logits[index], wanted[index], reduction="sum")


def hard_negatives(logits: Tensor, wanted: Tensor, ratio: float) -> Tensor:
    """(B, R) bool: of each image the hardest background priors, `ratio` times as many as it has positive ones.

    Arguments are those of `classification_loss`.
    """
    # Their loss. As YOLACT does, the exponent is taken relative to the largest logit of the batch, not of the row: a
    # row that lies more than 104 below it comes out as -infinity, and is chosen last
    top = logits.amax()
    loss = (logits - top).exp().sum(dim=2).log() + top - logits[:, :, 0]
    loss.masked_fill_(wanted != 0, -1)  # losses of background priors are positive, or -infinity
    count = (ratio * (wanted > 0).sum(dim=1)).long().clamp(max=logits.shape[1] - 1)
    hardest = loss.topk(int(count.max()), dim=1).indices
    turn = torch.arange(hardest.shape[1], device=logits.device)
    chosen = torch.zeros_like(wanted, dtype=torch.bool).scatter_(1, hardest, turn < count[:, None])
    return chosen & (wanted == 0)
