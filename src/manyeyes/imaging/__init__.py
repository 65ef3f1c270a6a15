"""Images as uint8 arrays: decode, geometry, preprocessing and augmentation, all pure functions on OpenCV."""

import cv2

# Parallelism comes from the workers; OpenCV's own threads would only fight with them for the same cores.
cv2.setNumThreads(0)
# A file that can't be decoded becomes an ImageError; its complaints on stderr would only spoil the progress line.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
