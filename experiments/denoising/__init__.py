"""Denoising and inpainting of faces with a structured covariance: section 5.3 of the SUPN paper, Table 4 and Figure 11."""
