"""Annotated pictures in the layouts that data sets come in: COCO's, Pascal VOC's, JSON beside images."""
