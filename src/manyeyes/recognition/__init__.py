"""Recognition without Keras: bundles, predictors and batch prediction."""
