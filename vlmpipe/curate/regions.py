"""From a URL to the country and the region of its host, by top-level domain.

Regions are the United Nations' geographic subregions (M49). Country domains that are sold worldwide as names of their
own (`.io`, `.tv`, `.ai` …, Google's list of "generic" country domains) and the generic ones (`.com`) say nothing about
a place: such a host is of no region, and groups are compared among those whose region is known.
"""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

REGIONS = {
    "northern_africa": "dz eg eh ly ma sd tn",
    "eastern_africa": "bi dj er et ke km mg mu mw mz re rw sc so ss tf tz ug yt zm zw",
    "middle_africa": "ao cd cf cg cm ga gq st td",
    "southern_africa": "bw ls na sz za",
    "western_africa": "bf bj ci cv gh gm gn gw lr ml mr ne ng sh sl sn tg",
    "northern_america": "bm ca gl pm us edu gov mil",
    "central_america": "bz cr gt hn mx ni pa sv",
    "caribbean": "ag ai aw bb bl bq bs cu cw dm do gd gp ht jm kn ky lc mf mq ms pr sx tc tt vc vg vi",
    "south_america": "ar bo br cl co ec fk gf gy pe py sr uy ve",
    "central_asia": "kg kz tj tm uz",
    "eastern_asia": "cn hk jp kp kr mn mo tw",
    "south_eastern_asia": "bn id kh la mm my ph sg th tl vn",
    "southern_asia": "af bd bt in ir lk mv np pk",
    "western_asia": "ae am az bh cy ge il iq jo kw lb om ps qa sa sy tr ye",
    "eastern_europe": "bg by cz hu md pl ro ru sk su ua",
    "northern_europe": "ax dk ee fi fo gb gg ie im is je lt lv no se sj uk",
    "southern_europe": "ad al ba es gi gr hr it me mk mt pt rs si sm va xk cat gal eus",
    "western_europe": "at be ch de fr li lu mc nl bzh",
    "australia_new_zealand": "au cc cx nf nz",
    "melanesia": "fj nc pg sb vu",
    "micronesia": "fm gu ki mh mp nr pw um",
    "polynesia": "as ck nu pf pn tk to tv wf ws",
}
SOLD_AS_NAMES = frozenset("ad ai as bz cc cd co dj fm io la me ms nu sc sr su tv tk ws".split())
COUNTRIES = {
    domain: region for region, domains in REGIONS.items() for domain in domains.split() if domain not in SOLD_AS_NAMES
}
HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]/]*\]|[^/?#:]*)"


def hosts(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The host of each URL in lower case, null where there is none."""
    array = pa.chunked_array([urls]) if isinstance(urls, pa.Array) else urls
    found = pc.struct_field(pc.extract_regex(array.cast(pa.string()).combine_chunks(), HOST), "host")
    found = found if isinstance(found, pa.Array) else found.combine_chunks()
    return pc.utf8_rtrim(pc.utf8_lower(found), ".")


def countries(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The country domain of each URL's host (`uk`, `jp`), null where its domain says no place."""
    return _by_host(urls, lambda host: _last(host) if _last(host) in COUNTRIES else None)


def regions(urls: pa.Array | pa.ChunkedArray, more: Mapping[str, str] | None = None) -> pa.Array:
    """The region of each URL's host, null where it is not known.

    Args:
        more: ending of a host (`com.test`, `bbc.com`, `eu`) -> region; the longest ending wins over the table.
    """
    endings = {ending.strip(".").lower(): region for ending, region in (more or {}).items()}

    def region(host: str) -> str | None:
        parts = host.split(".")
        for start in range(len(parts)):
            found = endings.get(".".join(parts[start:]))
            if found:
                return found
        return COUNTRIES.get(parts[-1])

    return _by_host(urls, region)


def _last(host: str) -> str:
    return host.rpartition(".")[2]


def _by_host(urls: pa.Array | pa.ChunkedArray, say) -> pa.Array:
    """One answer a distinct host: a pool has far fewer hosts than rows."""
    coded = hosts(urls).dictionary_encode()
    answers = pa.array([say(host) for host in coded.dictionary.to_pylist()], pa.string())
    return answers.take(coded.indices)
