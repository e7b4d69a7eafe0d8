"""The programs: each a thin main over the library."""
