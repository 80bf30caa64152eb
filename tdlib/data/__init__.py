"""Examples and where they come from: the official files of each task, their metrics, submissions and shifts.

It defines ``Example`` and reads VCR, SNLI-VE and VQA files as examples. It knows no model.
"""
