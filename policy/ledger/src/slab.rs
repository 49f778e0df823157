//! A vector with holes: stable indices of four octets, no allocation per item.

/// Items by index. An index stays valid until its item is removed.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    items: Vec<T>,
    free: Vec<u32>,
}

/// How many places are added to `len` that are taken: an eighth and not as many again, because most of the
/// gateway's memory is in what grows so.
pub(crate) fn growth(len: usize) -> usize {
    (len / 8).max(4)
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T: Default> Slab<T> {
    pub fn insert(&mut self, item: T) -> u32 {
        if let Some(i) = self.free.pop() {
            self.items[i as usize] = item;
            return i;
        }
        if self.items.len() == self.items.capacity() {
            self.items.reserve_exact(growth(self.items.len()));
        }
        self.items.push(item);
        // Quotas bound a table far below 2^32 items.
        (self.items.len() - 1) as u32
    }

    pub fn remove(&mut self, i: u32) -> T {
        self.free.push(i);
        std::mem::take(&mut self.items[i as usize])
    }

    /// The item, or an empty one where it was removed.
    pub fn get(&self, i: u32) -> Option<&T> {
        self.items.get(i as usize)
    }

    pub fn get_mut(&mut self, i: u32) -> Option<&mut T> {
        self.items.get_mut(i as usize)
    }

    /// One past the highest index in use.
    pub fn end(&self) -> u32 {
        self.items.len() as u32
    }

    pub fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}
