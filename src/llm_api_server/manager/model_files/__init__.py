"""Model files on disk: downloads for administrators, removal."""
