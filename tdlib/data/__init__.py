"""Examples and where they come from: the official files of each task, their metrics, submissions and shifts.

It owns what an ``Example`` is and how VCR, SNLI-VE and VQA files become some. It knows no model.
"""
