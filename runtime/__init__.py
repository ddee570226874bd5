"""The room that answers. It imports memory and never trains."""
