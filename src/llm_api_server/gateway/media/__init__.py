"""Images, audio and video in requests: found, checked, fetched."""
