"""What a file is that Pillow cannot open, by how it begins, and what to do about it."""


def is_heic(head: bytes) -> bool:
    """Whether a file that begins so is a HEIC or HEIF photo, by its major brand."""
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands


def register_heif() -> bool:
    """Teaches Pillow HEIC, where the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def reason_unidentified(head: bytes) -> str:
    """What a file that begins so is, where Pillow knows no format for it."""
    if not head:
        return "it is empty, 0 bytes"
    if is_heic(head):
        return "HEIC needs the package pillow-heif: pip install pillow-heif"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF needs Pillow 11.3 or newer"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL is not supported; convert it to PNG or JPEG"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not the image that it shows"
    if text.startswith((b"<svg", b"<?xml")):
        return "SVG and XML are drawings without pixels; render it to PNG first"
    if head.startswith(b"%PDF"):
        return "PDF pages are not pictures; render the page to PNG first"
    return "cannot identify its format"
