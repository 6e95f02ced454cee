//! Admin commands beyond those that make queues.

use p2plab_nvme::spec::command::{Command, NSID_ALL, admin};
use p2plab_nvme::spec::status::Status;

use super::Driver;

impl Driver {
    /// Get Log Page of `length` bytes from `offset`; `change` has the last word on the command.
    pub fn log_page_with(
        &mut self,
        lid: u8,
        offset: u64,
        length: u32,
        change: impl FnOnce(&mut Command),
    ) -> Result<Vec<u8>, Status> {
        let first = self.pages(0);
        let pages = u64::from(length).div_ceil(4096);
        let at = self.pages(pages);
        self.store(at, &vec![0xaa; length as usize]);
        let pages: Vec<u64> = (0..pages).map(|i| at + i * 4096).collect();
        let (prp1, prp2) = self.prps(&pages);
        let dwords_z = length / 4 - 1;
        let mut command = Command {
            opcode: admin::GET_LOG_PAGE,
            nsid: NSID_ALL.into(),
            prp1: prp1.into(),
            prp2: prp2.into(),
            cdw10: (u32::from(lid) | dwords_z << 16).into(),
            cdw11: (dwords_z >> 16).into(),
            cdw12: ((offset & 0xffff_ffff) as u32).into(),
            cdw13: ((offset >> 32) as u32).into(),
            ..Command::default()
        };
        change(&mut command);
        let result = self.admin(command);
        let data = self.load(at, length as usize);
        self.rewind(first);
        result.map(|_| data)
    }

    /// The first `length` bytes of a log page.
    pub fn log_page(&mut self, lid: u8, length: u32) -> Vec<u8> {
        self.log_page_with(lid, 0, length, |_| ()).unwrap()
    }

    /// An admin command without data.
    pub fn simple_admin(&mut self, opcode: u8, nsid: u32, dwords: [u32; 3]) -> Result<u32, Status> {
        let [cdw10, cdw11, cdw12] = dwords.map(Into::into);
        self.admin(Command {
            opcode,
            nsid: nsid.into(),
            cdw10,
            cdw11,
            cdw12,
            ..Command::default()
        })
    }

    pub fn set_feature(&mut self, fid: u8, cdw11: u32) -> Result<u32, Status> {
        self.simple_admin(admin::SET_FEATURES, 0, [fid.into(), cdw11, 0])
    }

    /// Get Features with `select` and `cdw11`.
    pub fn get_feature(&mut self, fid: u8, select: u32, cdw11: u32) -> Result<u32, Status> {
        let cdw10 = u32::from(fid) | select << 8;
        self.simple_admin(admin::GET_FEATURES, 0, [cdw10, cdw11, 0])
    }

    /// Identify Controller.
    pub fn identify_controller(&mut self) -> Vec<u8> {
        let first = self.pages(0);
        let page = self.pages(1);
        let command = Command {
            opcode: admin::IDENTIFY,
            prp1: page.into(),
            cdw10: 1.into(),
            ..Command::default()
        };
        self.admin(command).unwrap();
        let data = self.load(page, 4096);
        self.rewind(first);
        data
    }

    /// Leaves an Asynchronous Event Request with the controller.
    pub fn request_event(&mut self) -> u16 {
        self.submit(
            0,
            Command {
                opcode: admin::ASYNC_EVENT_REQUEST,
                ..Command::default()
            },
        )
    }

    /// The event that completed request `cid`, if one has: dword 0.
    pub fn poll_event(&mut self, cid: u16) -> Option<u32> {
        let completion = self.poll(0)?;
        assert_eq!(completion.cid.get(), cid, "{completion:?}");
        assert!(completion.status().is_success());
        Some(completion.dw0.get())
    }

    /// The event that completes request `cid`.
    pub fn event(&mut self, cid: u16) -> u32 {
        super::wait_until("an event", || self.poll_event(cid))
    }
}
