"""Region features of pictures: computed by a backbone and cached, or read from published files."""
