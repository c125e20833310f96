// Which tiles of a sequence a block works on, and in which order.
#pragma once

#include "scan.h"

namespace vim {

// A block visits the tiles of one chunk of time, or of the whole sequence where `chunk_tiles` is 0.
struct Walk {
    int seqlen, total_tiles, chunks, chunk, tile_begin, tile_end;
    bool descending;  // from the last tile to the first

    VIM_DEVICE Walk(int64_t tokens, int chunk_tiles, int index, bool from_the_end)
        : seqlen(static_cast<int>(tokens)), chunk(index), descending(from_the_end) {
        total_tiles = static_cast<int>(ceil_div(seqlen, kTile));
        const int length = chunk_tiles > 0 ? chunk_tiles : total_tiles;
        chunks = (total_tiles + length - 1) / length;
        tile_begin = chunk * length;
        tile_end = tile_begin + length < total_tiles ? tile_begin + length : total_tiles;
    }

    VIM_DEVICE int tiles() const { return tile_end - tile_begin; }
    VIM_DEVICE int tile_at(int walked) const { return descending ? tile_end - 1 - walked : tile_begin + walked; }
    VIM_DEVICE int first_token() const { return descending ? tile_end * kTile - 1 : tile_begin * kTile; }
    VIM_DEVICE int onward() const { return descending ? -1 : 1; }
    VIM_DEVICE bool in_sequence(int t) const { return static_cast<unsigned>(t) < static_cast<unsigned>(seqlen); }
};

}  // namespace vim
