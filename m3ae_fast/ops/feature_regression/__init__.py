from m3ae_fast.ops.feature_regression.op import feature_regression

__all__ = ["feature_regression"]
