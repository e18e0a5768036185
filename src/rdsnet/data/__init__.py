"""COCO folders, their check, transforms, loading, and synthetic shapes."""

from rdsnet.data.coco import CocoFolder, check_dataset
from rdsnet.data.loading import (
    EpochOrder,
    EvalDataset,
    TrainDataset,
    TrainLoader,
    collate,
    eval_batches,
    train_loader,
)
from rdsnet.data.records import Annotation, ImageRecord, Problem, read_image
from rdsnet.data.shapes import make_shapes
from rdsnet.data.transforms import Sample, eval_scale, eval_size
from rdsnet.rle import rasterise

__all__ = [
    "Annotation",
    "CocoFolder",
    "EpochOrder",
    "EvalDataset",
    "ImageRecord",
    "Problem",
    "Sample",
    "TrainDataset",
    "TrainLoader",
    "check_dataset",
    "collate",
    "eval_batches",
    "eval_scale",
    "eval_size",
    "make_shapes",
    "rasterise",
    "read_image",
    "train_loader",
]
