"""Images as uint8 arrays: decode, geometry, preprocessing and augmentation, all pure functions on OpenCV."""
