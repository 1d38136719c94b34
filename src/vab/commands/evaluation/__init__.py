"""Parts of ``vab evaluate``: folders to sounds, sounds to what judges hear, that to figures, figures to reports."""
