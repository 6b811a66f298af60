"""Image file in, labels out: an ensemble of preprocessing, a packaged model and the choice of classes."""

from trtdeploy.triton.pipeline.package import PackagedPipeline, package_pipeline

__all__ = ["PackagedPipeline", "package_pipeline"]
